//! The Python face: argument conversion, the GIL, exceptions. No algorithm lives here.

mod arguments;
mod encoding;
mod ids;
mod integers;
mod train;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::PRESETS;
use crate::error::Error;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        match error {
            Error::Io(path, io) => match io.raw_os_error() {
                // With the number, Python picks FileNotFoundError and its siblings.
                Some(number) => PyOSError::new_err((number, error_text(&io), path.display().to_string())),
                None => PyOSError::new_err(format!("{}: {io}", path.display())),
            },
            other => PyValueError::new_err(other.to_string()),
        }
    }
}

fn error_text(io: &std::io::Error) -> String {
    let text = io.to_string();
    text.split(" (os error").next().map_or_else(String::new, str::to_string)
}

#[pymodule(gil_used = false)]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let patterns = PyDict::new(module.py());
    PRESETS.iter().try_for_each(|(name, regex)| patterns.set_item(name, regex))?;
    module.add("PATTERNS", patterns)?;
    module.add_class::<encoding::PyEncoding>()?;
    module.add_function(wrap_pyfunction!(train::_train, module)?)
}
