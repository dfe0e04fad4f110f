// Where tensors lie and how, asked of torch through DLPack's exchange table: a C interface that needs no header of
// torch and costs a third of what the same questions cost in Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace mbf {

// The binary layout that DLPack 1 fixes. https://dmlc.github.io/dlpack
namespace dlpack {

struct Tensor {
    void* data;
    int32_t device_type, device_index;
    int32_t dimensions;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    int64_t *sizes, *strides;  // strides in elements
    uint64_t offset;           // in bytes
};

struct ExchangeTable {
    uint32_t major, minor;
    const void* previous;
    const void* managed[3];                         // allocate, from and to an object: not used here
    int (*describe)(void* object, Tensor* tensor);  // 0, or -1 and a Python exception
};

}  // namespace dlpack

using Addresses = std::vector<int64_t>;

// A list of tensors as it was once, to be compared with what it is later.
class TensorMemory {
public:
    // `table`: the capsule __dlpack_c_exchange_api__ of `type`, of which all tensors are. Raises ValueError for another
    // version of DLPack, and what torch raises where a tensor has no memory to tell of.
    TensorMemory(const pybind11::capsule& table, pybind11::type type, const pybind11::list& tensors)
        : table_(table.get_pointer<const dlpack::ExchangeTable>()), type_(std::move(type)) {
        if (table_->major != 1) throw pybind11::value_error("TensorMemory: expected DLPack 1");
        for (pybind11::handle tensor : tensors) {
            dlpack::Tensor found;
            if (!is_described(tensor, found)) throw pybind11::error_already_set();
            expected_.push_back(found);
            for (int i = 0; i < found.dimensions; ++i) extents_.push_back({found.sizes[i], found.strides[i]});
        }
    }

    // The addresses of tensors that are like the first ones in all but their place; none where one is not.
    std::optional<Addresses> addresses(const pybind11::list& tensors) const {
        Addresses found_addresses;
        found_addresses.reserve(expected_.size());
        const auto keep = [&](const dlpack::Tensor& found, const dlpack::Tensor&) {
            found_addresses.push_back(reinterpret_cast<int64_t>(found.data) + static_cast<int64_t>(found.offset));
            return true;
        };
        if (!all_alike(tensors, keep)) return std::nullopt;
        return found_addresses;
    }

    // Whether the tensors are where the first ones were, too.
    bool holds(const pybind11::list& tensors) const {
        return all_alike(tensors, [](const dlpack::Tensor& found, const dlpack::Tensor& expected) {
            return found.data == expected.data && found.offset == expected.offset;
        });
    }

private:
    struct Extent {
        int64_t size, stride;
    };

    bool is_described(pybind11::handle object, dlpack::Tensor& tensor) const {
        if (!PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(type_.ptr()))) {
            PyErr_SetString(PyExc_TypeError, "TensorMemory: expected tensors");
            return false;
        }
        return table_->describe(object.ptr(), &tensor) == 0;
    }

    template <class Also>
    bool all_alike(const pybind11::list& tensors, const Also& also) const {
        if (tensors.size() != expected_.size()) return false;
        const Extent* extents = extents_.data();
        for (size_t i = 0; i < expected_.size(); ++i) {
            const dlpack::Tensor& expected = expected_[i];
            dlpack::Tensor found;
            if (!is_described(PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i)), found)) {
                PyErr_Clear();
                return false;
            }
            if (!are_alike(found, expected, extents) || !also(found, expected)) return false;
            extents += expected.dimensions;
        }
        return true;
    }

    static bool are_alike(const dlpack::Tensor& found, const dlpack::Tensor& expected, const Extent* extents) {
        if (found.dimensions != expected.dimensions || found.device_type != expected.device_type ||
            found.device_index != expected.device_index || found.type_code != expected.type_code ||
            found.type_bits != expected.type_bits || found.type_lanes != expected.type_lanes ||
            !found.data != !expected.data)  // a tensor that stands for others has no memory of its own
            return false;
        for (int i = 0; i < found.dimensions; ++i)
            if (found.sizes[i] != extents[i].size || found.strides[i] != extents[i].stride) return false;
        return true;
    }

    const dlpack::ExchangeTable* table_;
    pybind11::type type_;
    std::vector<dlpack::Tensor> expected_;  // but for its sizes and strides, which may go
    std::vector<Extent> extents_;           // those of all tensors in a row
};

}  // namespace mbf
