// Python modules in CPython's limited API, so that one file serves every Python from 3.10 on.
// Files with modules include this and no header of torch.
#pragma once

// Before any standard header, as CPython asks. No PY_SSIZE_T_CLEAN: it is for formats with "#", and
// the oldest limited API, for which kernel-builder compiles, lacks what it needs.
#include <Python.h>

#ifndef Py_LIMITED_API
#error "setup.py defines Py_LIMITED_API: the file is named and shipped as one for every Python"
#endif

#include <exception>
#include <stdexcept>

#define SIMDIFF_JOIN_NAMES(a, b) a##b
#define SIMDIFF_INIT_NAME(name) SIMDIFF_JOIN_NAMES(PyInit_, name)
#define SIMDIFF_TEXT_OF(name) #name
#define SIMDIFF_NAME_TEXT(name) SIMDIFF_TEXT_OF(name)

namespace simdiff {

// What `body` returns; its C++ exception as ValueError or RuntimeError.
template <class Body>
PyObject* or_python_error(const Body& body) {
  try {
    return body();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// A list of what `convert` makes of each item: a new object or null with an error set.
template <class Items, class Convert>
PyObject* python_list(const Items& items, const Convert& convert) {
  PyObject* list = PyList_New(0);
  for (const auto& item : items) {
    PyObject* value = list == nullptr ? nullptr : convert(item);
    if (value == nullptr || PyList_Append(list, value) != 0) Py_CLEAR(list);
    Py_XDECREF(value);
    if (list == nullptr) break;
  }
  return list;
}

}  // namespace simdiff
