//! An encoding: vocabulary, split pattern, special tokens. Immutable, so threads share it freely.

use std::collections::HashSet;
use std::sync::{Arc, OnceLock};
use std::thread;

use aho_corasick::{AhoCorasick, MatchKind};
use sha2::{Digest, Sha256};

use crate::encode::Scratch;
use crate::error::{Error, Result};
use crate::split::Pattern;
use crate::train::split_by_bytes;
use crate::vocab::{Vocab, show};

#[derive(Debug)]
pub struct Encoding {
    vocab: Arc<Vocab>,
    pattern: Pattern,
    /// In id order.
    specials: Vec<(String, u32)>,
    hash: OnceLock<String>,
}

/// A choice among the special tokens of an encoding.
#[derive(Debug, Clone)]
pub enum Specials {
    All,
    Only(HashSet<String>),
}

impl Encoding {
    /// Refuses empty or repeated special tokens and ids that are taken.
    pub fn new(vocab: Vocab, pattern: Pattern, specials: Vec<(String, u32)>) -> Result<Self> {
        Self::assemble(vocab.into(), pattern, specials)
    }

    fn assemble(vocab: Arc<Vocab>, pattern: Pattern, mut specials: Vec<(String, u32)>) -> Result<Self> {
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
        Ok(Self { vocab, pattern, specials, hash: OnceLock::new() })
    }

    /// The same encoding with `names` after all ids there are.
    pub fn with_special_tokens(&self, names: Vec<String>) -> Result<Self> {
        let added = names.into_iter().zip(self.vocab_size()..);
        let specials = self.specials.iter().cloned().chain(added).collect();
        Self::assemble(self.vocab.clone(), self.pattern.clone(), specials)
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
    /// Refuses a vocabulary that was not made by merging alone (edited by hand, or with gaps).
    pub fn merges(&self) -> Result<Vec<(u32, u32)>> {
        let not_merged = |id: u32, what: &str| {
            Error::value(format!(
                "vocabulary: token {id} {what}, so this vocabulary cannot be written as 256 bytes and a list of merges"
            ))
        };
        let mut scratch = Scratch::default();
        let mut parts = Vec::new();
        let mut merges = Vec::new();
        for id in 0..self.vocab.id_bound() {
            let Some(token) = self.vocab.bytes(id) else { return not_merged(id, "does not exist") };
            if id < 256 {
                if token.len() != 1 {
                    return not_merged(id, "is longer than one byte");
                }
                continue;
            }
            parts.clear();
            scratch.set_limit(id);
            scratch.merge(&self.vocab, token, &mut parts);
            match parts[..] {
                [left, right] => merges.push((left, right)),
                _ => return not_merged(id, &format!("{} is not two earlier tokens", show(token))),
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
            sha.finalize().iter().map(|b| format!("{b:02x}")).collect()
        })
    }

    /// Appends the ids of `text`; special tokens in it are plain text.
    pub fn encode_ordinary(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<u32>) -> Result<()> {
        if text.len() >= u32::MAX as usize {
            return Error::value(format!("text: {} bytes in one string, the most is 4 GiB. Cut it", text.len()));
        }
        self.pattern.split(text, |piece| scratch.piece(&self.vocab, piece, out))
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

    /// The ids of each text as `encode_ordinary` gives them, on `threads` threads.
    pub fn encode_batch<S: AsRef<str> + Sync>(&self, texts: &[S], threads: usize) -> Result<Vec<Vec<u32>>> {
        let work = |share: &[S]| -> Result<Vec<Vec<u32>>> {
            let mut scratch = Scratch::default();
            share
                .iter()
                .map(|text| {
                    let mut ids = Vec::new();
                    self.encode_ordinary(text.as_ref(), &mut scratch, &mut ids).map(|()| ids)
                })
                .collect()
        };
        let mut shares = split_by_bytes(texts, threads.max(1)).into_iter().filter(|share| !share.is_empty());
        let Some(own) = shares.next() else { return Ok(Vec::new()) };
        thread::scope(|scope| {
            let jobs: Vec<_> = shares.map(|share| scope.spawn(move || work(share))).collect();
            let mut all = work(own)?;
            for job in jobs {
                all.extend(job.join().expect("encoding does not panic")?);
            }
            Ok(all)
        })
    }

    /// The bytes of `ids`, special tokens as their names.
    pub fn decode_bytes(&self, ids: &[u32]) -> Result<Vec<u8>> {
        let mut out = Vec::with_capacity(ids.len() * 4);
        for (i, &id) in ids.iter().enumerate() {
            match self.token_bytes(id) {
                Some(bytes) => out.extend_from_slice(bytes),
                None => return Error::value(format!("ids[{i}]: {}", self.no_token(id))),
            }
        }
        Ok(out)
    }

    /// Why an id has no bytes.
    pub fn no_token(&self, id: u32) -> String {
        format!("no token has id {id}, the vocabulary has {} ids", self.vocab_size())
    }
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
