//! What can go wrong, in words for the person who asked.

use std::fmt;
use std::path::PathBuf;

#[derive(Debug)]
pub enum Error {
    /// The caller's input is wrong; the text says what was found, what was expected and where.
    Value(String),
    /// The file system refused.
    Io(PathBuf, std::io::Error),
    /// The progress callback asked to stop.
    Stopped,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn value<T>(message: impl Into<String>) -> Result<T> {
        Err(Error::Value(message.into()))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Value(message) => f.write_str(message),
            Error::Io(path, error) => write!(f, "{}: {error}", path.display()),
            Error::Stopped => f.write_str("stopped by the progress callback"),
        }
    }
}

impl std::error::Error for Error {}
