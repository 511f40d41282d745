//! Lists of token ids from integers that are made once.

use std::sync::atomic::{AtomicUsize, Ordering};

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyInt, PyList};

use crate::runs::prefetch_at;

/// How many integers ahead one is asked for: they are more than the second cache holds.
const AHEAD: usize = 32;

/// Python's integer of each id: handing one out takes half the time of making one.
#[derive(Default)]
pub(super) struct Integers {
    /// How many ids went into lists so far.
    listed: AtomicUsize,
    /// None in an interpreter whose lists are not known to look like `List`.
    made: PyOnceLock<Option<Vec<Py<PyInt>>>>,
}

impl Integers {
    /// A list of `ids`, which are below `size`. The integers are made once that many were asked for.
    pub(super) fn list<'py>(&self, py: Python<'py>, ids: &[u32], size: u32) -> PyResult<Bound<'py, PyList>> {
        if self.listed.fetch_add(ids.len(), Ordering::Relaxed) < size as usize {
            return PyList::new(py, ids);
        }
        let make = || {
            let integer = |id: u32| Ok(id.into_pyobject(py)?.unbind());
            if looks_known(py)? { (0..size).map(integer).collect::<PyResult<Vec<_>>>().map(Some) } else { Ok(None) }
        };
        let Some(integers) = self.made.get_or_try_init(py, make)? else { return PyList::new(py, ids) };
        let address = |id: u32| integers[id as usize].as_ptr();
        // SAFETY: `looks_known`, so a new list of this length has that many items, all null, and nobody else sees it
        // before they are written. Each takes over the reference that its integer gains.
        unsafe {
            let list = Bound::from_owned_ptr_or_err(py, ffi::PyList_New(ids.len() as ffi::Py_ssize_t))?;
            let items = (*list.as_ptr().cast::<List>()).items;
            for (i, &id) in ids.iter().enumerate() {
                if let Some(&far) = ids.get(i + 2 * AHEAD) {
                    prefetch_at(&raw const integers[far as usize]);
                    prefetch_at(address(ids[i + AHEAD]));
                }
                let integer = address(id);
                add_reference(integer);
                items.add(i).write(integer);
            }
            Ok(list.cast_into_unchecked())
        }
    }
}

/// CPython's lists and counts of references. The stable ABI has a call for each, and with two calls for each id the lists
/// of 20 MB of text took a tenth longer, encoding included; so the memory is written where it is known to look so.
#[repr(C)]
struct List {
    count: u32,
    rest_of_count: u32,
    class: *mut ffi::PyTypeObject,
    len: ffi::Py_ssize_t,
    items: *mut *mut ffi::PyObject,
    room: ffi::Py_ssize_t,
}

/// The versions whose headers were read. Builds without a GIL, which count otherwise, do not load this ABI.
const FIRST: (u8, u8) = (3, 11);
const LAST: (u8, u8) = (3, 14);

/// Whether lists look like `List`: asks the version, then a list and an integer.
fn looks_known(py: Python<'_>) -> PyResult<bool> {
    let version = py.version_info();
    let little = cfg!(all(target_pointer_width = "64", target_endian = "little"));
    let cpython = py.import("sys")?.getattr("implementation")?.getattr("name")?.extract::<String>()? == "cpython";
    if !little || !cpython || !(FIRST..=LAST).contains(&(version.major, version.minor)) {
        return Ok(false);
    }
    let list = PyList::new(py, [1 << 20, 1 << 21])?;
    let size: usize = list.get_type().getattr("__basicsize__")?.extract()?;
    if size != size_of::<List>() {
        return Ok(false);
    }
    let first = list.get_item(0)?;
    let count = || {
        // SAFETY: the object is alive and larger than its count.
        unsafe { first.as_ptr().cast::<u32>().read_volatile() }
    };
    let before = count();
    let another = first.clone();
    let counts = count() == before + 1;
    drop(another);
    // SAFETY: the list has the size of `List`, and the versions above all have these fields.
    let (len, item) = unsafe {
        let raw = list.as_ptr().cast::<List>();
        ((*raw).len, (*raw).items.read())
    };
    Ok(counts && count() == before && len == 2 && item == first.as_ptr())
}

/// # Safety
///
/// `looks_known`, and the object is alive.
#[inline(always)]
unsafe fn add_reference(object: *mut ffi::PyObject) {
    // SAFETY: the count is the first word of an object, and the GIL is held. From the half of it on (objects that never
    // die, since 3.12; four billion references) the interpreter counts itself.
    unsafe {
        let count = object.cast::<u32>();
        if count.read() < 1 << 31 { count.write(count.read() + 1) } else { ffi::Py_INCREF(object) }
    }
}
