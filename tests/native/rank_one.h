// The driver's cases of the step whose F has rank one: their memory, and what has to become of it.
#pragma once

#include <functional>

#include "moments.h"

enum class Curvature { kNone, kInOrder, kPermuted };

// One tensor of a launch. Permuted as by channels_last: memory has every third entry of h first.
template <class S>
class RankOneTensors {
public:
    RankOneTensors(int64_t rows, int64_t columns, Curvature curvature, const mbf::RankOneParameters& parameters)
        : columns_(columns), order_{columns, 0, 1} {
        if (curvature == Curvature::kPermuted) order_ = {columns / 3, 1, 3};
        for (Buffer<S>* buffer : {&grad_, &momentum_, &param_}) *buffer = Buffer<S>(rows * columns, sizeof(S));
        problem = {rows * columns, columns,          {kMomentumWeight, nullptr, mbf::DType::kFloat64},
                   grad_.data(),   momentum_.data(), param_.data(),
                   nullptr,        nullptr,          order_};
        if (curvature != Curvature::kNone) {
            row_ = positive(rows), column_ = positive(columns);
            problem.row = row_.data(), problem.column = column_.data();
        }
        for (int64_t i = 0; i < problem.count; ++i) prepare(i, parameters);
    }

    template <class Visitor>
    void visit(Visitor visitor) {
        visitor("g", grad_), visitor("M", momentum_), visitor("W", param_), visitor("s", row_), visitor("h", column_);
    }

    mbf::RankOneProblem problem;

private:
    static Buffer<S> positive(int64_t count) {
        Buffer<S> vector(count, sizeof(S));
        for (int64_t i = 0; i < count; ++i) vector.initial(i) = 0.25 + fabs(random_number());
        return vector;
    }

    void prepare(int64_t i, const mbf::RankOneParameters& parameters) {
        const int64_t at = i % columns_, k = order_.outer ? at / (columns_ / 3) + at % (columns_ / 3) * 3 : at;
        const double f = problem.row ? double(row_.initial(i / columns_)) * column_.initial(k) : 0;
        const double g = grad_.initial(i) = random_number();
        double m = momentum_.initial(i) = random_number();
        double w = param_.initial(i) = random_number();
        rank_one_step(g, f, m, w, parameters, kNumbers);
        momentum_.expect(i, m, margin<S>(1, 1)), param_.expect(i, w, margin<S>(1, 1));
    }

    const int64_t columns_;
    mbf::Strides order_;
    Buffer<S> grad_, momentum_, param_, row_, column_;
};

using RankOneLaunch =
    std::function<void(mbf::DType, const std::vector<mbf::RankOneProblem>&, const mbf::RankOneParameters&)>;

// Rows around a register and around what a thread block takes, one element to a row, none, and so many that threads
// share them, also within one row.
const std::vector<std::pair<int64_t, int64_t>> kRankOneShapes = {
    {1, 3},  {3, 1},   {2, 6},   {5, 9},   {0, 3},    {3, 15},  {7, 18},
    {2, 33}, {1, 511}, {2, 256}, {1, 513}, {1, 1026}, {150, 9}, {3, 27003},
};

// On a GPU also more tensors than a table holds, and numbers that lie there.
template <class S>
void run_rank_one_case(const RankOneLaunch& launch, bool decoupled, bool on_gpu) {
    mbf::RankOneParameters parameters = {moment_parameters(false, false).step, decoupled};
    std::vector<std::unique_ptr<RankOneTensors<S>>> tensors;
    const auto add = [&](int64_t rows, int64_t columns, Curvature curvature) {
        tensors.push_back(std::make_unique<RankOneTensors<S>>(rows, columns, curvature, parameters));
    };
    for (const auto& [rows, columns] : kRankOneShapes) {
        add(rows, columns, Curvature::kNone), add(rows, columns, Curvature::kInOrder);
        if (columns % 3 == 0) add(rows, columns, Curvature::kPermuted);
    }
    for (int i = 0; on_gpu && i < 650; ++i) add(1, 1, Curvature::kInOrder);
    std::vector<mbf::RankOneProblem> problems;
    for (auto& tensor : tensors) problems.push_back(tensor->problem);
    static const float floats[] = {kLearningRate, kMomentumWeight};
    static const double damping = kDamping;
    if (on_gpu && decoupled) {
        parameters.step.lr = {NAN, &floats[0], mbf::DType::kFloat32};
        parameters.step.damping = {NAN, &damping, mbf::DType::kFloat64};
        for (auto& problem : problems) problem.momentum_weight = {NAN, &floats[1], mbf::DType::kFloat32};
    }
    for (auto& tensor : tensors) tensor->visit(Reset());
    launch(kDType<S>, problems, parameters);
    for (auto& tensor : tensors) tensor->visit(Check());
    ++cases;
}
