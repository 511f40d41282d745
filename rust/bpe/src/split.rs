//! Cuts a text into the pieces that BPE never merges across.
//!
//! The known patterns are scanned by hand: no backtracking, so no stack to overflow on a megabyte of blanks.
//! Any other pattern runs through `fancy-regex`; what it leaves unmatched is kept as a piece of its own, so that
//! encoding stays lossless (other libraries drop it).

use fancy_regex::Regex;

use crate::classes::{self, LETTER, LOWER, NEWLINE, NUMBER, SPACE, UPPER};
use crate::error::{Error, Result};
use crate::runs::letters;

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

    /// Calls `each` with the start and end of each piece of `text` in order; together they are the text.
    #[inline]
    pub fn split(&self, text: &str, each: impl FnMut(usize, usize)) -> Result<()> {
        let scanner = Scanner { bits: classes::bits(), text: text.as_bytes() };
        match &self.engine {
            Engine::Ghostvis => scanner.all(Scanner::gpt4::<2, false>, each),
            Engine::Gpt2 => scanner.all(Scanner::gpt2, each),
            Engine::Cl100k => scanner.all(Scanner::gpt4::<3, true>, each),
            Engine::Cl100kHf => scanner.all(Scanner::gpt4::<3, false>, each),
            Engine::Qwen2 => scanner.all(Scanner::gpt4::<1, false>, each),
            Engine::O200k => scanner.all(Scanner::o200k, each),
            Engine::Custom(regex) => return split_with(regex, text, each),
        }
        Ok(())
    }
}

fn split_with(regex: &Regex, text: &str, mut each: impl FnMut(usize, usize)) -> Result<()> {
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
            each(done, found.start());
        }
        if found.end() > found.start() {
            each(found.start(), found.end());
        }
        done = found.end();
    }
    if done < text.len() {
        each(done, text.len());
    }
    Ok(())
}

/// A text and the class bits of its characters. Positions are byte offsets at character borders.
#[derive(Clone, Copy)]
struct Scanner<'t> {
    bits: &'static [u8],
    text: &'t [u8],
}

impl Scanner<'_> {
    #[inline(always)]
    fn all(self, next: impl Fn(&Self, usize) -> usize, mut each: impl FnMut(usize, usize)) {
        let mut start = 0;
        while start < self.text.len() {
            let end = next(&self, start);
            each(start, end);
            start = end;
        }
    }

    /// Class bits and byte length of the character at `i`; `(0, 0)` at the end of the text.
    #[inline(always)]
    fn class(&self, i: usize) -> (u8, usize) {
        match self.text.get(i) {
            None => (0, 0),
            Some(&b) if b < 0x80 => (self.bits[b as usize], 1),
            Some(&b) => self.class_wide(b as usize, i),
        }
    }

    /// The text came from a `str`, so the continuation bytes are there.
    #[inline]
    fn class_wide(&self, lead: usize, i: usize) -> (u8, usize) {
        let low = |k: usize| (self.text[i + k] & 0x3f) as usize;
        let (point, len) = match lead {
            0..0xe0 => ((lead & 0x1f) << 6 | low(1), 2),
            0xe0..0xf0 => ((lead & 0x0f) << 12 | low(1) << 6 | low(2), 3),
            _ => ((lead & 0x07) << 18 | low(1) << 12 | low(2) << 6 | low(3), 4),
        };
        (self.bits[point], len)
    }

    /// End of the run of characters from `i` that have a bit of `mask`.
    #[inline(always)]
    fn run(&self, mut i: usize, mask: u8) -> usize {
        loop {
            let (class, len) = self.class(i);
            if class & mask == 0 {
                return i;
            }
            i += len;
        }
    }

    /// End of the run of characters from `i` that have no bit of `mask`.
    #[inline(always)]
    fn run_without(&self, mut i: usize, mask: u8) -> usize {
        loop {
            let (class, len) = self.class(i);
            if len == 0 || class & mask != 0 {
                return i;
            }
            i += len;
        }
    }

    /// End of the run of letters from `i`.
    #[inline(always)]
    fn letters(&self, mut i: usize) -> usize {
        loop {
            let Some(block) = self.text[i..].first_chunk::<16>() else { return self.run(i, LETTER) };
            let run = (!letters(block)).trailing_zeros() as usize;
            i += run;
            if run < 16 {
                if block[run] < 0x80 {
                    return i;
                }
                // A letter beyond ASCII seldom stands alone.
                let from = i;
                while let Some(&lead) = self.text.get(i)
                    && lead >= 0x80
                {
                    let (class, len) = self.class_wide(lead as usize, i);
                    if class & LETTER == 0 {
                        return i;
                    }
                    i += len;
                }
                debug_assert!(i > from);
            }
        }
    }

    #[inline(always)]
    fn digits(&self, mut i: usize, most: usize) -> usize {
        for _ in 0..most {
            let (class, len) = self.class(i);
            if class & NUMBER == 0 {
                break;
            }
            i += len;
        }
        i
    }

    /// End of `'(?:[sdmt]|ll|ve|re)` at `i`, or `i`. Folding case, `s` is also U+017F, the long s.
    fn contraction(&self, i: usize, fold: bool) -> usize {
        let Some((b'\'', rest)) = self.text[i..].split_first() else { return i };
        let at = |k: usize| match rest.get(k) {
            Some(&b) if fold => b.to_ascii_lowercase(),
            Some(&b) => b,
            None => 0,
        };
        match (at(0), at(1)) {
            (b's' | b'd' | b'm' | b't', _) => i + 2,
            (b'l', b'l') | (b'v', b'e') | (b'r', b'e') => i + 3,
            _ if fold && rest.starts_with("ſ".as_bytes()) => i + 3,
            _ => i,
        }
    }

    /// The blanks from `i` on: up to the last newline (`\s*[\r\n]`, where the pattern has it), else all at the end
    /// of the text, else all but the last one (`\s+(?!\S)`), else the only one. `end_first`: `\s++$` comes first.
    #[inline(always)]
    fn blanks(&self, start: usize, newlines: bool, end_first: bool) -> usize {
        let (mut i, mut last, mut after_newline) = (start, start, start);
        loop {
            let (class, len) = self.class(i);
            if class & SPACE == 0 {
                break;
            }
            last = i;
            i += len;
            if class & NEWLINE != 0 {
                after_newline = i;
            }
        }
        let at_end = i == self.text.len();
        if newlines && after_newline > start && !(end_first && at_end) {
            after_newline
        } else if at_end || last == start {
            i
        } else {
            last
        }
    }

    fn gpt2(&self, start: usize) -> usize {
        let contraction = self.contraction(start, false);
        if contraction > start {
            return contraction;
        }
        let body = if self.text[start] == b' ' { start + 1 } else { start };
        let (class, len) = self.class(body);
        if class & LETTER != 0 {
            self.letters(body + len)
        } else if class & NUMBER != 0 {
            self.run(body + len, NUMBER)
        } else if len > 0 && class & SPACE == 0 {
            self.run_without(body + len, SPACE | LETTER | NUMBER)
        } else {
            self.blanks(start, false, true)
        }
    }

    /// The GPT-4 shape: words with one leading sign, `DIGITS` digits, signs with their newlines, blanks.
    #[inline(always)]
    fn gpt4<const DIGITS: usize, const END_FIRST: bool>(&self, start: usize) -> usize {
        let (class, len) = self.class(start);
        if class & LETTER != 0 {
            return self.letters(start + len);
        }
        let next = start + len;
        if class & (NUMBER | NEWLINE) == 0 {
            let (after, after_len) = self.class(next);
            if after & LETTER != 0 {
                let contraction = self.contraction(start, true);
                return if contraction > start { contraction } else { self.letters(next + after_len) };
            }
        } else if class & NUMBER != 0 {
            return self.digits(start, DIGITS);
        }
        let signs = self.signs(start);
        if signs > start { self.run(signs, NEWLINE) } else { self.blanks(start, true, END_FIRST) }
    }

    /// End of ` ?[^\s\p{L}\p{N}]+` at `start`, or `start`.
    #[inline(always)]
    fn signs(&self, start: usize) -> usize {
        let body = if self.text[start] == b' ' { start + 1 } else { start };
        let end = self.run_without(body, SPACE | LETTER | NUMBER);
        if end > body { end } else { start }
    }

    fn o200k(&self, start: usize) -> usize {
        let (class, len) = self.class(start);
        let may_lead = class & (LETTER | NUMBER | NEWLINE) == 0;
        let lead = start + if may_lead { len } else { 0 };
        // Alternative by alternative, each with the leading sign before without it, as the regex tries them.
        for (word, from) in [(Self::lower_word as fn(&Self, usize) -> usize, lead), (Self::lower_word, start)]
            .into_iter()
            .chain([(Self::upper_word as fn(&Self, usize) -> usize, lead), (Self::upper_word, start)])
        {
            let end = word(self, from);
            if end > from {
                return self.contraction(end, true);
            }
        }
        if class & NUMBER != 0 {
            return self.digits(start, 3);
        }
        let mut signs = self.signs(start);
        if signs == start {
            return self.blanks(start, true, false);
        }
        while let Some(b'\r' | b'\n' | b'/') = self.text.get(signs) {
            signs += 1;
        }
        signs
    }

    /// End of `UPPER*LOWER+` at `i`, or `i`. Letters without case and marks are in both classes.
    fn lower_word(&self, i: usize) -> usize {
        let (mut end, mut after_both) = (i, i);
        loop {
            let (class, len) = self.class(end);
            if class & UPPER == 0 {
                break;
            }
            end += len;
            if class & LOWER != 0 {
                after_both = end;
            }
        }
        let lower = self.run(end, LOWER);
        if lower > end { lower } else { after_both }
    }

    /// End of `UPPER+LOWER*` at `i`, or `i`.
    fn upper_word(&self, i: usize) -> usize {
        let upper = self.run(i, UPPER);
        if upper > i { self.run(upper, LOWER) } else { i }
    }
}
