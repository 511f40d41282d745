//! Files: our own, JSON that a person can read with the hash of its content; Hugging Face's; tiktoken's ranks.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::encoding::Encoding;
use crate::error::{Error, Result};
use crate::hf;
use crate::split::Pattern;
use crate::vocab::Vocab;

const FORMAT: &str = "ghostvis-bpe";
const VERSION: u32 = 1;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    format: String,
    version: u32,
    sha256: String,
    pattern: String,
    /// Token `i` is the byte `bytes[i]`.
    bytes: Vec<u8>,
    special_tokens: Vec<(String, u32)>,
    /// "nfc"; absent where text is taken as it is.
    normalizer: Option<String>,
    /// Token `256 + i` is the two tokens of `merges[i]`.
    merges: Vec<(u32, u32)>,
}

#[derive(Deserialize)]
struct Header {
    format: Option<String>,
    version: Option<u32>,
}

/// The text of the file.
pub fn to_json(encoding: &Encoding) -> Result<String> {
    let merges = encoding.merges()?;
    let quoted = |text: &str| serde_json::to_string(text).expect("a string is always JSON");
    let bytes: Vec<String> =
        (0..256).filter_map(|id| encoding.vocab().bytes(id)).map(|token| token[0].to_string()).collect();
    let specials: Vec<String> =
        encoding.specials().iter().map(|(name, id)| format!("\n    [{}, {id}]", quoted(name))).collect();
    let merges: Vec<String> = merges.iter().map(|(left, right)| format!("\n    [{left}, {right}]")).collect();
    let mut out = String::new();
    writeln!(out, "{{\n  \"format\": {},\n  \"version\": {VERSION},", quoted(FORMAT))
        .and_then(|()| writeln!(out, "  \"sha256\": {},", quoted(encoding.hash())))
        .and_then(|()| writeln!(out, "  \"pattern\": {},", quoted(encoding.pattern().regex())))
        .and_then(|()| if encoding.nfc() { writeln!(out, "  \"normalizer\": \"nfc\",") } else { Ok(()) })
        .and_then(|()| writeln!(out, "  \"bytes\": [{}],", bytes.join(", ")))
        .and_then(|()| writeln!(out, "  \"special_tokens\": [{}\n  ],", specials.join(",")))
        .and_then(|()| writeln!(out, "  \"merges\": [{}\n  ]\n}}", merges.join(",")))
        .expect("writing to a string does not fail");
    Ok(out)
}

/// `place` is what error messages call the source.
pub fn from_json(json: &[u8], place: &str) -> Result<Encoding> {
    let parse_error = |error: serde_json::Error| Error::Value(format!("{place}: not a whole {FORMAT} file: {error}"));
    let header: Header = serde_json::from_slice(json).map_err(parse_error)?;
    if header.format.as_deref() != Some(FORMAT) {
        return Error::value(format!("{place}: not a {FORMAT} file: \"format\" is {:?}", header.format));
    }
    if header.version != Some(VERSION) {
        let found = header.version.map_or("missing".to_string(), |v| v.to_string());
        return Error::value(format!("{place}: file version {found}, this library reads {VERSION}"));
    }
    let contents: Contents = serde_json::from_slice(json).map_err(parse_error)?;
    debug_assert_eq!((contents.format.as_str(), contents.version), (FORMAT, VERSION));
    if contents.bytes.len() != 256 {
        return Error::value(format!("{place}: \"bytes\" has {} entries, 256 expected", contents.bytes.len()));
    }
    let build = || {
        let vocab = Vocab::from_merges(&contents.bytes, &contents.merges)?;
        let encoding = Encoding::new(vocab, Pattern::new(&contents.pattern)?, contents.special_tokens)?;
        match contents.normalizer.as_deref() {
            None => Ok(encoding),
            Some("nfc") => Ok(encoding.with_nfc()),
            Some(other) => Error::value(format!("normalizer: {other:?} is not known, \"nfc\" is")),
        }
    };
    let encoding = build().map_err(|error| Error::Value(format!("{place}: {error}")))?;
    if encoding.hash() != contents.sha256 {
        return Error::value(format!(
            "{place}: the content was changed or damaged: its sha256 is {}, the file says {}",
            encoding.hash(),
            contents.sha256
        ));
    }
    Ok(encoding)
}

pub fn load(path: &Path) -> Result<Encoding> {
    from_json(&read(path)?, &path.display().to_string())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|error| Error::Io(path.to_path_buf(), error))
}

pub fn save(encoding: &Encoding, path: &Path) -> Result<()> {
    write_whole(path, to_json(encoding)?.as_bytes())
}

/// Writes a temporary file beside `path` and renames it, so that no reader ever sees half of it.
fn write_whole(path: &Path, content: &[u8]) -> Result<()> {
    let Some(name) = path.file_name() else {
        return Error::value(format!("path: {:?} names no file", path.display()));
    };
    let mut temporary = name.to_os_string();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(temporary);
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|error| {
        // Nothing to report about the clean-up: the first error is the one to know.
        let _ = fs::remove_file(&temporary);
        Error::Io(path.to_path_buf(), error)
    })
}

/// Reads a `tokenizer.json` of Hugging Face's library.
pub fn load_hf(path: &Path) -> Result<Encoding> {
    hf::from_json(&read(path)?, &path.display().to_string())
}

/// Writes a `tokenizer.json` that Hugging Face's library loads with the same ids.
pub fn save_hf(encoding: &Encoding, path: &Path) -> Result<()> {
    write_whole(path, hf::to_json(encoding)?.as_bytes())
}

/// Writes tiktoken's rank file. Pattern and special tokens have no place in it.
pub fn save_ranks(encoding: &Encoding, path: &Path) -> Result<()> {
    let mut out = String::new();
    for id in 0..encoding.vocab().id_bound() {
        if let Some(token) = encoding.vocab().bytes(id) {
            writeln!(out, "{} {id}", STANDARD.encode(token)).expect("writing to a string does not fail");
        }
    }
    write_whole(path, out.as_bytes())
}

/// Reads tiktoken's rank file: a base64 token, a blank and its rank on each line.
pub fn read_ranks(path: &Path) -> Result<Vec<(Vec<u8>, u32)>> {
    let text = read(path)?;
    let mut ranks = Vec::new();
    for (i, line) in text.split(|&b| b == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        let parsed = line.iter().position(|&b| b == b' ').and_then(|blank| {
            let token = STANDARD.decode(&line[..blank]).ok()?;
            let rank = std::str::from_utf8(&line[blank + 1..]).ok()?.parse().ok()?;
            Some((token, rank))
        });
        match parsed {
            Some(entry) => ranks.push(entry),
            None => {
                return Error::value(format!(
                    "{}, line {}: expected a base64 token, a blank and a rank, found {}",
                    path.display(),
                    i + 1,
                    crate::vocab::show(&line[..line.len().min(60)])
                ));
            }
        }
    }
    Ok(ranks)
}
