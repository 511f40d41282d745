//! An encoding: vocabulary, split pattern, special tokens. Immutable, so threads share it freely.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use aho_corasick::{AhoCorasick, MatchKind};
use sha2::{Digest, Sha256};
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

use crate::encode::Scratch;
use crate::error::{Error, Result};
use crate::repeat;
use crate::split::{Pattern, Pieces};
use crate::threads::{all_cores, in_turn, split_by_bytes};
use crate::vocab::{Vocab, show};

#[derive(Debug)]
pub struct Encoding {
    vocab: Arc<Vocab>,
    pattern: Pattern,
    /// In id order.
    specials: Vec<(String, u32)>,
    /// Whether text is brought into Unicode's normal form C first.
    nfc: bool,
    hash: OnceLock<String>,
    /// Scratches with warm caches, at most one for each thread that encoded at the same time as others. Boxed, as one of
    /// 6 KB moves out and in at every call.
    idle: Mutex<Vec<Box<Scratch>>>,
}

/// How often the list of idle scratches is tried: ten microseconds.
const TRIES: usize = 1000;
/// Bytes of a run of texts that a thread takes at once.
const RUN_BYTES: usize = 1 << 18;

/// A choice among the special tokens of an encoding.
#[derive(Debug, Clone)]
pub enum Specials {
    All,
    Only(HashSet<String>),
}

impl Encoding {
    /// Refuses empty or repeated special tokens and ids that are taken.
    pub fn new(vocab: Vocab, pattern: Pattern, specials: Vec<(String, u32)>) -> Result<Self> {
        Self::assemble(vocab.into(), pattern, specials, false)
    }

    /// The same encoding, which normalizes text to NFC before cutting it, as Qwen's do.
    pub fn with_nfc(mut self) -> Self {
        self.nfc = true;
        self.hash = OnceLock::new();
        self
    }

    pub fn nfc(&self) -> bool {
        self.nfc
    }

    fn assemble(vocab: Arc<Vocab>, pattern: Pattern, mut specials: Vec<(String, u32)>, nfc: bool) -> Result<Self> {
        check_names(specials.iter().map(|s| s.0.as_str()))?;
        specials.sort_by_key(|s| s.1);
        let mut last_id = None;
        for (name, id) in &specials {
            if let Some(token) = vocab.bytes(*id) {
                return Error::value(format!("special_tokens: id {id} of {name:?} is the token {}", show(token)));
            }
            if last_id == Some(*id) {
                return Error::value(format!("special_tokens: id {id} of {name:?} has another name too"));
            }
            if *id as usize >= crate::train::MAX_VOCAB_SIZE {
                return Error::value(format!("special_tokens: id {id} of {name:?} is too large"));
            }
            last_id = Some(*id);
        }
        Ok(Self { vocab, pattern, specials, nfc, hash: OnceLock::new(), idle: Mutex::default() })
    }

    /// The same encoding with `names` after all ids there are.
    pub fn with_special_tokens(&self, names: Vec<String>) -> Result<Self> {
        let added = names.into_iter().zip(self.vocab_size()..);
        let specials = self.specials.iter().cloned().chain(added).collect();
        Self::assemble(self.vocab.clone(), self.pattern.clone(), specials, self.nfc)
    }

    pub fn vocab(&self) -> &Vocab {
        &self.vocab
    }

    pub fn pattern(&self) -> &Pattern {
        &self.pattern
    }

    /// In id order.
    pub fn specials(&self) -> &[(String, u32)] {
        &self.specials
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> u32 {
        let special = self.specials.last().map_or(0, |s| s.1 + 1);
        self.vocab.id_bound().max(special)
    }

    /// The bytes of a token, special or not.
    #[inline]
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.vocab.bytes(id).or_else(|| {
            let at = self.specials.binary_search_by_key(&id, |s| s.1).ok()?;
            Some(self.specials[at].0.as_bytes())
        })
    }

    /// The pair that each token past the bytes is made of: token `256 + i` joins the two ids of entry `i`.
    ///
    /// Refuses a vocabulary that was not made by merging alone (edited by hand), or where ids have gaps.
    pub fn merges(&self) -> Result<Vec<(u32, u32)>> {
        for id in 0..self.vocab.id_bound() {
            match self.vocab.bytes(id) {
                None => return Error::value(not_merged(id, "does not exist")),
                Some(token) if id < 256 && token.len() != 1 => {
                    return Error::value(not_merged(id, "is longer than one byte"));
                }
                Some(_) => {}
            }
        }
        self.merges_by_id()
    }

    /// The two ids that each token of several bytes is made of, in the order of their ids, which may have gaps.
    ///
    /// Refuses a token that no two earlier ones make.
    pub fn merges_by_id(&self) -> Result<Vec<(u32, u32)>> {
        let mut scratch = Scratch::default();
        let mut parts = Vec::new();
        let mut merges = Vec::new();
        for id in 0..self.vocab.id_bound() {
            let Some(token) = self.vocab.bytes(id).filter(|token| token.len() > 1) else { continue };
            parts.clear();
            scratch.set_limit(id);
            scratch.merge(&self.vocab, token, &mut parts);
            match parts[..] {
                [left, right] if left < id && right < id => merges.push((left, right)),
                _ => return Error::value(not_merged(id, &format!("{} is not two earlier tokens", show(token)))),
            }
        }
        Ok(merges)
    }

    /// SHA-256 of everything that decides an id: pattern, tokens and special tokens with their ids.
    pub fn hash(&self) -> &str {
        self.hash.get_or_init(|| {
            let mut sha = Sha256::new();
            let mut field = |id: u32, bytes: &[u8]| {
                sha.update(id.to_le_bytes());
                sha.update((bytes.len() as u64).to_le_bytes());
                sha.update(bytes);
            };
            field(1, self.pattern.regex().as_bytes());
            field(self.vocab.tokens() as u32, b"tokens");
            for id in 0..self.vocab.id_bound() {
                if let Some(token) = self.vocab.bytes(id) {
                    field(id, token);
                }
            }
            field(self.specials.len() as u32, b"special tokens");
            for (name, id) in &self.specials {
                field(*id, name.as_bytes());
            }
            if self.nfc {
                field(1, b"nfc");
            }
            sha.finalize().iter().map(|b| format!("{b:02x}")).collect()
        })
    }

    /// Appends the ids of `text`; special tokens in it are plain text.
    pub fn encode_ordinary(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<u32>) -> Result<()> {
        if text.len() >= u32::MAX as usize {
            return Error::value(format!("text: {} bytes in one string, the most is 4 GiB. Cut it", text.len()));
        }
        let normal;
        let text = if self.nfc && !text.is_ascii() && is_nfc_quick(text.chars()) != IsNormalized::Yes {
            normal = text.nfc().collect::<String>();
            normal.as_str()
        } else {
            text
        };
        let (vocab, bytes) = (&*self.vocab, text.as_bytes());
        scratch.begin(vocab);
        self.pattern.split(text, Sink { vocab, bytes, scratch, out })?;
        scratch.finish(vocab, bytes, out);
        Ok(())
    }

    /// Appends the ids of `text`, special tokens in `allowed` as their ids.
    ///
    /// An error where `text` has one of `disallowed` (`All`: all that are not allowed). Where special tokens overlap,
    /// the leftmost and then the longest counts. The text between them is split on its own.
    pub fn encode(
        &self,
        text: &str,
        allowed: &Specials,
        disallowed: &Specials,
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
    ) -> Result<()> {
        let allowed = self.choose(allowed, "allowed_special")?;
        let disallowed = match disallowed {
            Specials::All => self.specials.iter().filter(|s| !allowed.contains(s)).collect(),
            Specials::Only(_) => self.choose(disallowed, "disallowed_special")?,
        };
        if let Some(found) = finder(&disallowed).and_then(|finder| finder.find(text)) {
            return Error::value(format!(
                "text: special token {:?} at byte {}. Allow it by allowed_special, or make it plain text by \
                 disallowed_special=() or encode_ordinary",
                disallowed[found.pattern()].0,
                found.start()
            ));
        }
        let mut done = 0;
        if let Some(finder) = finder(&allowed) {
            for found in finder.find_iter(text) {
                self.encode_ordinary(&text[done..found.start()], scratch, out)?;
                out.push(allowed[found.pattern()].1);
                done = found.end();
            }
        }
        self.encode_ordinary(&text[done..], scratch, out)
    }

    fn choose(&self, specials: &Specials, argument: &str) -> Result<Vec<&(String, u32)>> {
        let Specials::Only(names) = specials else { return Ok(self.specials.iter().collect()) };
        let chosen: Vec<_> = self.specials.iter().filter(|s| names.contains(&s.0)).collect();
        if chosen.len() < names.len() {
            let mut unknown: Vec<_> = names.iter().filter(|n| self.specials.iter().all(|s| s.0 != **n)).collect();
            unknown.sort();
            let known: Vec<_> = self.specials.iter().map(|s| &s.0).collect();
            return Error::value(format!("{argument}: {unknown:?} not among the special tokens {known:?}"));
        }
        Ok(chosen)
    }

    /// Lends a scratch whose cache may know this encoding's pieces already.
    ///
    /// Never waits long: where the list of idle ones stays taken (a fork may have left it so), a new one is made.
    pub fn with_scratch<T>(&self, work: impl FnOnce(&mut Scratch) -> T) -> T {
        let mut scratch = self.idle().and_then(|mut idle| idle.pop()).unwrap_or_default();
        let result = work(&mut scratch);
        if let Some(mut idle) = self.idle()
            && idle.len() < all_cores()
        {
            idle.push(scratch);
        }
        result
    }

    /// The list of idle scratches. Others hold it for some nanoseconds, and a cold cache costs milliseconds.
    fn idle(&self) -> Option<MutexGuard<'_, Vec<Box<Scratch>>>> {
        (0..TRIES).find_map(|_| {
            std::hint::spin_loop();
            self.idle.try_lock().ok()
        })
    }

    /// The ids of all texts as `encode_ordinary` gives them, one after the other, and where each text ends, on
    /// `threads` threads: a pair for each run of texts.
    ///
    /// Threads take runs in turn, as texts of equal length may take times that differ tenfold.
    pub fn encode_flat<S: AsRef<str> + Sync>(
        &self,
        texts: &[S],
        threads: usize,
    ) -> Result<Vec<(Vec<u32>, Vec<usize>)>> {
        let bytes = |share: &[S]| share.iter().map(|text| text.as_ref().len()).sum::<usize>();
        let runs = if threads > 1 { (bytes(texts) / RUN_BYTES).max(threads) } else { 1 };
        let shares: Vec<&[S]> = split_by_bytes(texts, runs).into_iter().filter(|share| !share.is_empty()).collect();
        let encode = |share: &[S], scratch: &mut Scratch| -> Result<(Vec<u32>, Vec<usize>)> {
            let mut ids = Vec::with_capacity(bytes(share) / 3);
            let mut ends = Vec::with_capacity(share.len());
            for text in share {
                self.encode_ordinary(text.as_ref(), scratch, &mut ids)?;
                ends.push(ids.len());
            }
            Ok((ids, ends))
        };
        in_turn(shares.len(), threads, |take| {
            self.with_scratch(|scratch| {
                let mut done = Vec::new();
                while let Some(i) = take() {
                    done.push((i, encode(shares[i], scratch)?));
                }
                Ok(done)
            })
        })
    }

    /// The ids of each text as `encode_ordinary` gives them, on `threads` threads.
    pub fn encode_batch<S: AsRef<str> + Sync>(&self, texts: &[S], threads: usize) -> Result<Vec<Vec<u32>>> {
        let mut batch = Vec::with_capacity(texts.len());
        for (ids, ends) in self.encode_flat(texts, threads)? {
            let mut start = 0;
            for end in ends {
                batch.push(ids[start..end].to_vec());
                start = end;
            }
        }
        Ok(batch)
    }

    /// The bytes of `ids`, special tokens as their names.
    pub fn decode_bytes(&self, ids: &[u32]) -> Result<Vec<u8>> {
        let mut out = vec![0; self.decoded_len(ids)?];
        self.decode_into(ids, &mut out);
        Ok(out)
    }

    /// How many bytes `ids` have. An error for an id that does not exist.
    pub fn decoded_len(&self, ids: &[u32]) -> Result<usize> {
        let mut len = 0;
        for (i, &id) in ids.iter().enumerate() {
            match self.token_bytes(id) {
                Some(bytes) => len += bytes.len(),
                None => return Error::value(format!("ids[{i}]: {}", self.no_token(id))),
            }
        }
        Ok(len)
    }

    /// Writes the bytes of `ids` over `out`, which has `decoded_len` bytes.
    pub fn decode_into(&self, ids: &[u32], out: &mut [u8]) {
        let mut at = 0;
        for &id in ids {
            if let Some((block, len)) = self.vocab.block(id)
                && let Some(place) = out.get_mut(at..at + block.len())
            {
                // Sixteen bytes at once are faster than exactly as many as the token has; the next token mends it.
                place.copy_from_slice(block);
                at += len;
                continue;
            }
            let bytes = self.token_bytes(id).expect("decoded_len has looked up every id");
            out[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        }
    }

    /// Why an id has no bytes.
    pub fn no_token(&self, id: u32) -> String {
        format!("no token has id {id}, the vocabulary has {} ids", self.vocab_size())
    }
}

/// Takes the pieces of a text to their ids.
struct Sink<'a> {
    vocab: &'a Vocab,
    bytes: &'a [u8],
    scratch: &'a mut Scratch,
    out: &'a mut Vec<u32>,
}

impl Pieces for Sink<'_> {
    #[inline(always)]
    fn piece(&mut self, start: usize, end: usize) {
        self.scratch.push(self.vocab, self.bytes, start, end - start, self.out);
    }

    #[inline(never)]
    fn same(&mut self, start: usize, len: usize, count: usize) {
        self.scratch.finish(self.vocab, self.bytes, self.out);
        let first = self.out.len();
        self.scratch.push(self.vocab, self.bytes, start, len, self.out);
        self.scratch.finish(self.vocab, self.bytes, self.out);
        repeat::again(self.out, first, count - 1);
    }
}

fn not_merged(id: u32, what: &str) -> String {
    format!("vocabulary: token {id} {what}, so this vocabulary cannot be written as 256 bytes and a list of merges")
}

/// Refuses an empty and a repeated name of a special token.
pub fn check_names<'a>(names: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut seen = HashSet::new();
    for (i, name) in names.enumerate() {
        if name.is_empty() {
            return Error::value(format!("special_tokens[{i}]: the name is empty"));
        }
        if !seen.insert(name) {
            return Error::value(format!("special_tokens[{i}]: {name:?} is given twice"));
        }
    }
    Ok(())
}

fn finder(specials: &[&(String, u32)]) -> Option<AhoCorasick> {
    if specials.is_empty() {
        return None;
    }
    let names = specials.iter().map(|s| &s.0);
    let built = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(names);
    Some(built.expect("special tokens are far fewer than the automaton's limits"))
}
