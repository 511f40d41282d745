//! Cuts a text into the pieces that BPE never merges across.
//!
//! The known patterns are scanned by hand: no backtracking, so no stack to overflow on a megabyte of blanks.
//! Any other pattern runs through `fancy-regex`; what it leaves unmatched is kept as a piece of its own, so that
//! encoding stays lossless (other libraries drop it).

use fancy_regex::Regex;

use crate::error::{Error, Result};
use crate::scanner::Scanner;

const GHOSTVIS: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const GPT2: &str = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s";
const CL100K: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// What `tokenizer.json` files of cl100k have: three digits, and newlines before blanks at the end of a text as well.
const CL100K_HF: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The presets in words that Oniguruma, the engine of Hugging Face's `tokenizers`, takes to mean the same: there
/// `{1,3}+` is a nested repetition, and `$` is the end of a line. The first of a preset is what we write.
const HF_FORMS: [(&str, &str); 5] = [
    (
        "ghostvis",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    ("gpt2", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
    (
        "cl100k",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    ("qwen2", QWEN2),
    ("o200k", O200K),
];

/// Names of the patterns that are scanned by hand, each with the regex it stands for.
pub const PRESETS: [(&str, &str); 5] =
    [("ghostvis", GHOSTVIS), ("gpt2", GPT2), ("cl100k", CL100K), ("qwen2", QWEN2), ("o200k", O200K)];

/// What takes the pieces of a text, in order.
pub trait Pieces {
    /// The piece `text[start..end]`.
    fn piece(&mut self, start: usize, end: usize);

    /// `count` pieces of `len` bytes from `start` on, all the same.
    fn same(&mut self, start: usize, len: usize, count: usize) {
        (0..count).for_each(|i| self.piece(start + i * len, start + (i + 1) * len));
    }
}

impl<F: FnMut(usize, usize)> Pieces for F {
    #[inline(always)]
    fn piece(&mut self, start: usize, end: usize) {
        self(start, end);
    }
}

#[derive(Debug, Clone)]
enum Engine {
    Ghostvis,
    Gpt2,
    Cl100k,
    Cl100kHf,
    Qwen2,
    O200k,
    Custom(Box<Regex>),
}

/// A compiled split pattern.
#[derive(Debug, Clone)]
pub struct Pattern {
    regex: String,
    engine: Engine,
}

impl Pattern {
    /// From the name of a preset or a regular expression; the text of a preset's regex is that preset.
    pub fn new(name_or_regex: &str) -> Result<Self> {
        let preset = PRESETS.iter().find(|(name, regex)| *name == name_or_regex || *regex == name_or_regex);
        let Some((name, regex)) = preset else {
            if name_or_regex == CL100K_HF {
                return Ok(Self { regex: CL100K_HF.to_string(), engine: Engine::Cl100kHf });
            }
            return Self::custom(name_or_regex);
        };
        let engine = match *name {
            "ghostvis" => Engine::Ghostvis,
            "gpt2" => Engine::Gpt2,
            "cl100k" => Engine::Cl100k,
            "qwen2" => Engine::Qwen2,
            _ => Engine::O200k,
        };
        Ok(Self { regex: (*regex).to_string(), engine })
    }

    fn custom(regex: &str) -> Result<Self> {
        let names = PRESETS.map(|(name, _)| name).join(", ");
        if !regex.is_empty() && regex.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-') {
            return Error::value(format!("pattern: {regex:?} is not a known name ({names}) and has no regex syntax"));
        }
        match Regex::new(regex) {
            Ok(compiled) => Ok(Self { regex: regex.to_string(), engine: Engine::Custom(Box::new(compiled)) }),
            Err(error) => Error::value(format!(
                "pattern: {regex:?} does not compile: {error}. Give a regular expression or one of: {names}"
            )),
        }
    }

    /// From the regular expression of a `tokenizer.json`; one that means a preset becomes that preset.
    pub fn from_hf(regex: &str) -> Result<Self> {
        if let Some((name, _)) = HF_FORMS.iter().find(|(_, form)| *form == regex) {
            return Self::new(name);
        }
        let pattern = Self::new(regex)?;
        pattern.check_portable()?;
        Ok(pattern)
    }

    /// The regular expression for a `tokenizer.json`. Refuses one that Oniguruma would read differently.
    pub fn to_hf(&self) -> Result<&str> {
        if let Some((name, _)) = PRESETS.iter().find(|(_, regex)| *regex == self.regex) {
            return Ok(HF_FORMS.iter().find(|(preset, _)| preset == name).expect("every preset has a form").1);
        }
        self.check_portable()?;
        Ok(&self.regex)
    }

    fn check_portable(&self) -> Result<()> {
        if !matches!(self.engine, Engine::Custom(_)) {
            return Ok(());
        }
        let bare = self.regex.replace("[^", "[").replace("(?:", "(");
        let differs = ["}+", "$", "^", r"\h", r"\Z", r"\K", r"\G", r"\R", r"\X"];
        match differs.iter().find(|part| bare.contains(**part)) {
            None => Ok(()),
            Some(part) => Error::value(format!(
                "pattern: {:?} has {part}, which tokenizers' engine (Oniguruma) reads differently from ours. Write the \
                 pattern without it",
                self.regex
            )),
        }
    }

    /// The regular expression, also of a preset.
    pub fn regex(&self) -> &str {
        &self.regex
    }

    /// Hands on the start and end of each piece of `text`, to a closure or other `Pieces`; together they are the text.
    #[inline]
    pub fn split(&self, text: &str, pieces: impl Pieces) -> Result<()> {
        let scanner = Scanner::new(text);
        match &self.engine {
            Engine::Ghostvis => scanner.all_gpt4::<2, false>(pieces),
            Engine::Gpt2 => scanner.all(None, Scanner::gpt2, pieces),
            Engine::Cl100k => scanner.all_gpt4::<3, true>(pieces),
            Engine::Cl100kHf => scanner.all_gpt4::<3, false>(pieces),
            Engine::Qwen2 => scanner.all_gpt4::<1, false>(pieces),
            Engine::O200k => scanner.all(Some(3), Scanner::o200k, pieces),
            Engine::Custom(regex) => return split_with(regex, text, pieces),
        }
        Ok(())
    }
}

fn split_with(regex: &Regex, text: &str, mut pieces: impl Pieces) -> Result<()> {
    let mut done = 0;
    for found in regex.find_iter(text) {
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                return Error::value(format!(
                    "pattern {:?} gave up after byte {done} of a text: {error}",
                    regex.as_str()
                ));
            }
        };
        if found.start() > done {
            pieces.piece(done, found.start());
        }
        if found.end() > found.start() {
            pieces.piece(found.start(), found.end());
        }
        done = found.end();
    }
    if done < text.len() {
        pieces.piece(done, text.len());
    }
    Ok(())
}
