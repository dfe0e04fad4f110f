// With tensor_memory.h the only file that knows Python. Tensors arrive as integers (addresses, counts, strides in
// elements) that mbf_kernels/native.py has checked; nothing here depends on torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <utility>
#include <variant>

#include "cpu/dispatch.h"
#include "cuda/launch.h"
#include "emulator/fibers.h"
#include "layout.h"
#include "tensor_memory.h"

namespace py = pybind11;

using Problems = std::vector<mbf::Problem>;
using SharedProblems = std::vector<mbf::SharedProblem>;
using DiagonalProblems = std::vector<mbf::DiagonalProblem>;
using RankOneProblems = std::vector<mbf::RankOneProblem>;
PYBIND11_MAKE_OPAQUE(mbf::Addresses)
PYBIND11_MAKE_OPAQUE(Problems)
PYBIND11_MAKE_OPAQUE(SharedProblems)
PYBIND11_MAKE_OPAQUE(DiagonalProblems)
PYBIND11_MAKE_OPAQUE(RankOneProblems)

namespace {

template <class T>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// (address, block inner count, outer, inner, element inner count, outer, inner); None: the op has no such view.
using View = std::optional<std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>>;

mbf::BlockView block_view(const View& view) {
    if (!view) return {};
    const auto& [base, block_count, block_outer, block_inner, element_count, element_outer, element_inner] = *view;
    return {
        pointer<void>(base), {block_count, block_outer, block_inner}, {element_count, element_outer, element_inner}};
}

// A number, or where it lies on the device.
using Number = std::variant<double, std::pair<int64_t, mbf::DType>>;

mbf::Scalar scalar(const Number& number) {
    if (const double* value = std::get_if<double>(&number)) return {*value, nullptr, mbf::DType::kFloat64};
    const auto& [address, dtype] = std::get<1>(number);
    return {0, pointer<void>(address), dtype};
}

mbf::Problem problem(int64_t count, int64_t fisher, int64_t factor, int64_t info, int64_t skipped,
                     const Number& momentum_weight, const Number& fisher_weight, const View& grad, const View& rhs,
                     const View& out) {
    return {count,
            pointer<void>(fisher),
            pointer<void>(factor),
            pointer<int32_t>(info),
            pointer<int64_t>(skipped),
            scalar(momentum_weight),
            scalar(fisher_weight),
            block_view(grad),
            block_view(rhs),
            block_view(out)};
}

// ((address, matrix stride, sample inner count, outer, inner, element inner count, outer, inner), (address and stride
// of the bias) or None where none joins); None: the step has no such tensor.
using SharedView =
    std::optional<std::pair<std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>,
                            std::optional<std::pair<int64_t, int64_t>>>>;

mbf::SharedView shared_view(const SharedView& view) {
    if (!view) return {};
    const auto& [base, matrix, sample_count, sample_outer, sample_inner, element_count, element_outer, element_inner] =
        view->first;
    const auto& [last, last_sample] = view->second.value_or(std::pair<int64_t, int64_t>());
    return {pointer<void>(base),
            matrix,
            {sample_count, sample_outer, sample_inner},
            {element_count, element_outer, element_inner},
            pointer<void>(last),
            last_sample,
            view->second.has_value()};
}

mbf::SharedProblem shared_problem(int64_t count, int64_t samples, int64_t fisher, int64_t factor, int64_t info,
                                  int64_t skipped, double momentum_weight, double square_weight, const SharedView& grad,
                                  const SharedView& momentum, const SharedView& square, const SharedView& param) {
    return {count,
            samples,
            pointer<void>(fisher),
            pointer<void>(factor),
            pointer<int32_t>(info),
            pointer<int64_t>(skipped),
            momentum_weight,
            square_weight,
            shared_view(grad),
            shared_view(momentum),
            shared_view(square),
            shared_view(param)};
}

mbf::DiagonalProblem diagonal_problem(int64_t count, double momentum_weight, double square_weight, int64_t grad,
                                      int64_t momentum, int64_t square, int64_t param) {
    return {count,
            momentum_weight,
            square_weight,
            pointer<void>(grad),
            pointer<void>(momentum),
            pointer<void>(square),
            pointer<void>(param)};
}

// row, column: (address, 0 without one); order: (inner count, outer, inner) of entries of h.
mbf::RankOneProblem rank_one_problem(int64_t count, int64_t columns, const Number& momentum_weight, int64_t grad,
                                     int64_t momentum, int64_t param, int64_t row, int64_t column,
                                     const std::tuple<int64_t, int64_t, int64_t>& order) {
    const auto& [inner_count, outer, inner] = order;
    return {count,
            columns,
            scalar(momentum_weight),
            pointer<void>(grad),
            pointer<void>(momentum),
            pointer<void>(param),
            pointer<void>(row),
            pointer<void>(column),
            {inner_count, outer, inner}};
}

// A launch is kept for the next step, whose gradients lie elsewhere and whose weights are others.
template <class Problem>
py::class_<std::vector<Problem>> bind_launch(py::module_& m, const char* name) {
    py::class_<std::vector<Problem>> launch(m, name);
    launch.def(py::init([](const py::iterable& problems) {
        std::vector<Problem> list;
        for (py::handle problem : problems) list.push_back(problem.cast<Problem>());
        return list;
    }));
    launch.def("__len__", &std::vector<Problem>::size);
    return launch;
}

// Points a tensor of every problem at the next of the addresses, of which a weight that a bias joins takes two.
template <class Void>
void point(Void*& tensor, const mbf::Addresses& addresses, size_t& next) {
    tensor = pointer<Void>(addresses.at(next++));
}
void point(mbf::BlockView& view, const mbf::Addresses& addresses, size_t& next) {
    point(view.base, addresses, next);
}
void point(mbf::SharedView& view, const mbf::Addresses& addresses, size_t& next) {
    point(view.base, addresses, next);
    if (view.joined) point(view.last, addresses, next);
}

template <class Problem, class Tensor>
auto set_addresses(Tensor Problem::* tensor) {
    return [tensor](std::vector<Problem>& problems, const mbf::Addresses& addresses) {
        size_t next = 0;
        for (Problem& problem : problems) point(problem.*tensor, addresses, next);
    };
}

template <class Problem>
void set_moment_weights(std::vector<Problem>& problems, double momentum_weight, double square_weight) {
    for (Problem& problem : problems) {
        problem.momentum_weight = momentum_weight;
        problem.square_weight = square_weight;
    }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of mbf_kernels: call them through mbf_kernels.ops, which checks the tensors.";
    m.attr("MAX_SIZE") = MBF_MAX_SIZE;
    m.attr("MAX_TILED_SIZE") = MBF_MAX_TILED_SIZE;
    m.attr("TILE_BLOCKS") = mbf::kTileBlocks;

    py::enum_<mbf::DType>(m, "DType").value("float32", mbf::DType::kFloat32).value("float64", mbf::DType::kFloat64);
    py::enum_<mbf::Op>(m, "Op")
        .value("accumulate_", mbf::Op::kAccumulate)
        .value("factor", mbf::Op::kFactor)
        .value("solve", mbf::Op::kSolve)
        .value("accumulate_factor_solve_", mbf::Op::kFused)
        .value("mbf_step_", mbf::Op::kStep);

    py::class_<mbf::Problem>(m, "Problem")
        .def(py::init(&problem), py::kw_only(), py::arg("count"), py::arg("fisher") = 0, py::arg("factor") = 0,
             py::arg("info") = 0, py::arg("skipped") = 0, py::arg("momentum_weight") = 1.0,
             py::arg("fisher_weight") = 1.0, py::arg("grad") = py::none(), py::arg("rhs") = py::none(),
             py::arg("out") = py::none());

    py::class_<mbf::Parameters>(m, "Parameters")
        .def(py::init([](const Number& lr, double momentum, double decay, const Number& damping, double weight_decay,
                         double eps, bool relative, bool graft, bool nesterov, bool maximize, bool update,
                         bool refactor, int64_t rhs_count) {
                 return mbf::Parameters{scalar(lr), scalar(damping), momentum, decay,  weight_decay, eps,      relative,
                                        graft,      nesterov,        maximize, update, refactor,     rhs_count};
             }),
             py::kw_only(), py::arg("lr") = 0.0, py::arg("momentum") = 0.0, py::arg("decay") = 0.0,
             py::arg("damping") = 0.0, py::arg("weight_decay") = 0.0, py::arg("eps") = 0.0, py::arg("relative") = false,
             py::arg("graft") = false, py::arg("nesterov") = false, py::arg("maximize") = false,
             py::arg("update") = true, py::arg("refactor") = true, py::arg("rhs_count") = 1)
        .def("set_rates", [](mbf::Parameters& parameters, const Number& lr, const Number& damping) {
            parameters.lr = scalar(lr);
            parameters.damping = scalar(damping);
        });

    py::class_<mbf::SharedProblem>(m, "SharedProblem")
        .def(py::init(&shared_problem), py::kw_only(), py::arg("count"), py::arg("samples"), py::arg("fisher"),
             py::arg("factor") = 0, py::arg("info") = 0, py::arg("skipped") = 0, py::arg("momentum_weight") = 1.0,
             py::arg("square_weight") = 1.0, py::arg("grad"), py::arg("momentum"), py::arg("square") = py::none(),
             py::arg("param"));
    py::class_<mbf::DiagonalProblem>(m, "DiagonalProblem")
        .def(py::init(&diagonal_problem), py::kw_only(), py::arg("count"), py::arg("momentum_weight"),
             py::arg("square_weight"), py::arg("grad"), py::arg("momentum"), py::arg("square"), py::arg("param"));
    py::class_<mbf::RankOneParameters>(m, "RankOneParameters")
        .def(py::init<const mbf::Parameters&, bool>(), py::arg("step"), py::arg("decoupled"));
    py::class_<mbf::RankOneProblem>(m, "RankOneProblem")
        .def(py::init(&rank_one_problem), py::kw_only(), py::arg("count"), py::arg("columns"),
             py::arg("momentum_weight"), py::arg("grad"), py::arg("momentum"), py::arg("param"), py::arg("row"),
             py::arg("column"), py::arg("order"));

    bind_launch<mbf::Problem>(m, "Problems")
        .def("set_gradients", set_addresses(&mbf::Problem::grad))
        .def("set_params", set_addresses(&mbf::Problem::out))
        .def("set_weights", [](Problems& problems, const Number& momentum_weight, const Number& fisher_weight) {
            for (mbf::Problem& problem : problems) {
                problem.momentum_weight = scalar(momentum_weight);
                problem.fisher_weight = scalar(fisher_weight);
            }
        });
    bind_launch<mbf::SharedProblem>(m, "SharedProblems")
        .def("set_gradients", set_addresses(&mbf::SharedProblem::grad))
        .def("set_params", set_addresses(&mbf::SharedProblem::param))
        .def("set_weights", &set_moment_weights<mbf::SharedProblem>);
    bind_launch<mbf::DiagonalProblem>(m, "DiagonalProblems")
        .def("set_gradients", set_addresses(&mbf::DiagonalProblem::grad))
        .def("set_params", set_addresses(&mbf::DiagonalProblem::param))
        .def("set_weights", &set_moment_weights<mbf::DiagonalProblem>);
    bind_launch<mbf::RankOneProblem>(m, "RankOneProblems");

    py::class_<mbf::Addresses>(m, "Addresses")
        .def(py::init([](const py::list& addresses) {
            mbf::Addresses list;
            for (py::handle address : addresses) list.push_back(address.cast<int64_t>());
            return list;
        }))
        .def(
            "__iter__", [](const mbf::Addresses& list) { return py::make_iterator(list.begin(), list.end()); },
            py::keep_alive<0, 1>());
    py::implicitly_convertible<py::list, mbf::Addresses>();
    py::class_<mbf::TensorMemory>(m, "TensorMemory")
        .def(py::init<const py::capsule&, py::type, const py::list&>(), py::arg("table"), py::arg("type"),
             py::arg("tensors"))
        .def("addresses", &mbf::TensorMemory::addresses, py::arg("tensors"))
        .def("holds", &mbf::TensorMemory::holds, py::arg("tensors"));

    m.def(
        "cpu_launch_shared",
        [](mbf::DType dtype, int size, const SharedProblems& problems, const mbf::Parameters& parameters,
           double square_decay,
           int threads) { mbf::cpu::launch_shared(dtype, size, problems, {parameters, square_decay}, threads); },
        py::arg("dtype"), py::arg("size"), py::arg("problems"), py::arg("parameters"), py::arg("square_decay"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>());
    m.def(
        "cpu_launch_diagonal",
        [](mbf::DType dtype, const DiagonalProblems& problems, const mbf::Parameters& parameters, double square_decay,
           int threads) { mbf::cpu::launch_diagonal(dtype, problems, {parameters, square_decay}, threads); },
        py::arg("dtype"), py::arg("problems"), py::arg("parameters"), py::arg("square_decay"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
    m.def("cpu_launch_rank_one", &mbf::cpu::launch_rank_one, py::arg("dtype"), py::arg("problems"),
          py::arg("parameters"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
    m.def("cpu_launch", &mbf::cpu::launch, py::arg("op"), py::arg("dtype"), py::arg("size"), py::arg("problems"),
          py::arg("parameters"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
    m.def("cpu_isas", &mbf::cpu::supported_isas);
    m.def("cpu_isa", &mbf::cpu::isa);
    m.def("set_cpu_isa", &mbf::cpu::set_isa, py::arg("name"));

    py::enum_<mbf::Mapping>(m, "Mapping")
        .value("auto", mbf::Mapping::kAuto)
        .value("thread", mbf::Mapping::kThread)
        .value("group", mbf::Mapping::kGroup)
        .value("block", mbf::Mapping::kBlock);
#ifdef MBF_WITH_CUDA
    m.def("cuda_launch", &mbf::cuda::launch, py::arg("op"), py::arg("dtype"), py::arg("size"), py::arg("problems"),
          py::arg("parameters"), py::arg("device"), py::arg("stream"), py::arg("mapping"),
          py::call_guard<py::gil_scoped_release>());
    m.def("cuda_launch_rank_one", &mbf::cuda::launch_rank_one, py::arg("dtype"), py::arg("problems"),
          py::arg("parameters"), py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
    m.attr("CUDA_ARCHITECTURES") = MBF_WITH_CUDA;
#endif
#ifdef MBF_WITH_EMULATOR
    m.def("emulated_launch", &mbf::emulated::launch, py::arg("op"), py::arg("dtype"), py::arg("size"),
          py::arg("problems"), py::arg("parameters"), py::arg("device"), py::arg("stream"), py::arg("mapping"),
          py::call_guard<py::gil_scoped_release>());
    m.def("emulated_launch_rank_one", &mbf::emulated::launch_rank_one, py::arg("dtype"), py::arg("problems"),
          py::arg("parameters"), py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
    m.def("set_emulated_schedule", &emulator::set_schedule, py::arg("seed"));
#endif
}
