//! Hugging Face's `tokenizer.json`, for byte-level BPE: GPT-2's kind and Qwen2.5's.
//!
//! What could change an id and is not known here is refused. What surrounds the ids (truncation, padding, templates of
//! the post-processor) is not read.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::encoding::Encoding;
use crate::error::{Error, Result};
use crate::split::Pattern;
use crate::vocab::{Vocab, show};

#[derive(Deserialize)]
struct Contents {
    #[serde(default)]
    added_tokens: Vec<Added>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    model: Model,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
}

#[derive(Deserialize)]
struct Model {
    r#type: Option<String>,
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
    dropout: Option<f64>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    /// Before version 0.20 of the library: two tokens with a blank between.
    Text(String),
}

impl Merge {
    fn parts(&self) -> Option<(&str, &str)> {
        match self {
            Merge::Pair(left, right) => Some((left, right)),
            Merge::Text(text) => text.split_once(' '),
        }
    }
}

/// The bytes in the order in which Hugging Face numbers them: those whose letter is the byte itself, then the rest.
pub fn byte_order() -> [u8; 256] {
    let seen = |b: &u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut order = [0; 256];
    let bytes = (0..=255u8).filter(seen).chain((0..=255u8).filter(|b| !seen(b)));
    order.iter_mut().zip(bytes).for_each(|(place, byte)| *place = byte);
    order
}

/// The letter that stands for each byte: itself where it can be seen, the next from U+0100 on for the others
/// (Radford et al. 2019).
fn letters() -> [char; 256] {
    let mut letters = ['\0'; 256];
    for (i, byte) in byte_order().into_iter().enumerate() {
        // The order has the 188 bytes that can be seen first.
        letters[byte as usize] =
            if i < 188 { byte as char } else { char::from_u32(0x100 + i as u32 - 188).expect("below U+0144") };
    }
    letters
}

/// `place` is what error messages call the source.
pub fn from_json(text: &[u8], place: &str) -> Result<Encoding> {
    let contents: Contents = serde_json::from_slice(text)
        .map_err(|error| Error::Value(format!("{place}: not a tokenizer.json of a byte-level BPE: {error}")))?;
    build(contents).map_err(|error| Error::Value(format!("{place}: {error}")))
}

fn build(contents: Contents) -> Result<Encoding> {
    let Contents { added_tokens, normalizer, pre_tokenizer, model } = contents;
    check_model(&model)?;
    let nfc = match &normalizer {
        None => false,
        Some(value) if value["type"] == "NFC" => true,
        Some(other) => return Error::value(format!("normalizer: {other} is not known, NFC and none are")),
    };
    for token in &added_tokens {
        if token.single_word || token.lstrip || token.rstrip || (token.normalized && nfc) {
            return Error::value(format!(
                "added_tokens: {:?} has single_word, lstrip, rstrip or normalized, which change what is matched",
                token.content
            ));
        }
    }
    let pattern = pattern_of(pre_tokenizer.as_ref())?;
    let vocab = vocab_of(&model, &added_tokens)?;
    let specials = added_tokens.into_iter().map(|token| (token.content, token.id)).collect();
    let encoding = Encoding::new(vocab, pattern, specials)?;
    check_merges(&encoding, &model.merges)?;
    Ok(if nfc { encoding.with_nfc() } else { encoding })
}

fn check_model(model: &Model) -> Result<()> {
    let plain = |text: &Option<String>| text.as_deref().unwrap_or_default().is_empty();
    let refuse = |what: &str| Error::value(format!("model: {what}, so it is not a byte-level BPE as GPT-2's"));
    if model.r#type.as_deref().unwrap_or("BPE") != "BPE" {
        return refuse(&format!("its type is {:?}", model.r#type.as_deref().unwrap_or_default()));
    }
    if model.dropout.is_some_and(|dropout| dropout > 0.0) {
        return refuse("it has dropout");
    }
    if !plain(&model.continuing_subword_prefix) || !plain(&model.end_of_word_suffix) {
        return refuse("it has a prefix or suffix of words");
    }
    if model.byte_fallback { refuse("it falls back to bytes") } else { Ok(()) }
}

fn pattern_of(pre_tokenizer: Option<&Value>) -> Result<Pattern> {
    let unknown = |value: &Value| {
        Error::value(format!(
            "pre_tokenizer: {value} is not known; ByteLevel with use_regex, and Split by a Regex (Isolated) then \
             ByteLevel, are, both without add_prefix_space"
        ))
    };
    let Some(value) = pre_tokenizer else { return unknown(&Value::Null) };
    let byte_level = |value: &Value, regex: bool| {
        // Files from before `use_regex` existed mean true.
        value["type"] == "ByteLevel"
            && value["add_prefix_space"] == false
            && value["use_regex"].as_bool().unwrap_or(true) == regex
    };
    if byte_level(value, true) {
        return Pattern::new("gpt2");
    }
    let Some([split, bytes]) = value["pretokenizers"].as_array().map(Vec::as_slice) else { return unknown(value) };
    let isolated = split["type"] == "Split" && split["behavior"] == "Isolated" && split["invert"] == false;
    match split["pattern"]["Regex"].as_str() {
        Some(regex) if value["type"] == "Sequence" && isolated && byte_level(bytes, false) => Pattern::from_hf(regex),
        _ => unknown(value),
    }
}

fn vocab_of(model: &Model, added: &[Added]) -> Result<Vocab> {
    let bytes_of: HashMap<char, u8> = letters().into_iter().zip(0..=255).collect();
    let added: HashSet<(&str, u32)> = added.iter().map(|token| (token.content.as_str(), token.id)).collect();
    let mut tokens: Vec<(Vec<u8>, u32)> = Vec::with_capacity(model.vocab.len());
    for (text, &id) in &model.vocab {
        if added.contains(&(text.as_str(), id)) {
            continue;
        }
        match text.chars().map(|letter| bytes_of.get(&letter).copied()).collect() {
            Some(bytes) => tokens.push((bytes, id)),
            None => return Error::value(format!("model.vocab: {text:?} is not written in the letters of bytes")),
        }
    }
    Vocab::new(&tokens)
}

/// Ids are our ranks, so the merges must be those that the ids imply, in the order of the ids.
fn check_merges(encoding: &Encoding, listed: &[Merge]) -> Result<()> {
    let merges = encoding.merges_by_id()?;
    if merges.len() != listed.len() {
        return Error::value(format!("model.merges: {} for {} tokens of several bytes", listed.len(), merges.len()));
    }
    let letters = letters();
    let text = |id: u32| -> String {
        let bytes = encoding.vocab().bytes(id).expect("a merge joins tokens that exist");
        bytes.iter().map(|&byte| letters[byte as usize]).collect()
    };
    for (i, (merge, (left, right))) in listed.iter().zip(merges).enumerate() {
        let expected = (text(left), text(right));
        if merge.parts() != Some((&expected.0, &expected.1)) {
            return Error::value(format!(
                "model.merges[{i}]: {:?}, but the ids of the vocabulary imply {expected:?} there: its ids are not in \
                 the order of its merges",
                merge.parts()
            ));
        }
    }
    Ok(())
}

/// The text of a `tokenizer.json`. Refuses a vocabulary that was not made by merging alone, a pattern that the library
/// would read differently, and a special token that is written like a token.
pub fn to_json(encoding: &Encoding) -> Result<String> {
    let merges = encoding.merges_by_id()?;
    let regex = encoding.pattern().to_hf()?;
    let letters = letters();
    let vocab = encoding.vocab();
    let written = |id: u32| {
        let bytes = vocab.bytes(id).expect("asked for tokens that exist");
        quoted(&bytes.iter().map(|&byte| letters[byte as usize]).collect::<String>())
    };
    let mut entries: Vec<(u32, String)> =
        (0..vocab.id_bound()).filter(|&id| vocab.bytes(id).is_some()).map(|id| (id, written(id))).collect();
    let names: HashSet<String> = entries.iter().map(|(_, text)| text.clone()).collect();
    // The library numbers added tokens on from the size of the vocabulary, except those that the vocabulary has.
    let follow = (entries.len() as u32..).zip(encoding.specials()).all(|(id, special)| id == special.1);
    for (name, id) in encoding.specials() {
        let text = quoted(name);
        if names.contains(&text) {
            return Error::value(format!("special token {name:?} is written like the token {}", show(name.as_bytes())));
        }
        if !follow {
            entries.push((*id, text));
        }
    }
    let added: Vec<Value> = encoding
        .specials()
        .iter()
        .map(|(name, id)| {
            json!({"id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let split = json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let normalizer = if encoding.nfc() { json!({"type": "NFC"}) } else { Value::Null };
    let mut out = String::from("{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n");
    let mut line = |name: &str, value: Value| writeln!(out, "  \"{name}\": {value},");
    line("added_tokens", Value::Array(added))
        .and_then(|()| line("normalizer", normalizer))
        .and_then(|()| line("pre_tokenizer", json!({"type": "Sequence", "pretokenizers": [split, byte_level]})))
        .and_then(|()| line("post_processor", Value::Null))
        .and_then(|()| line("decoder", byte_level.clone()))
        .expect("writing to a string does not fail");
    let entries: Vec<String> = entries.iter().map(|(id, text)| format!("\n      {text}: {id}")).collect();
    let merges: Vec<String> =
        merges.iter().map(|&(left, right)| format!("\n      [{}, {}]", written(left), written(right))).collect();
    out.push_str("  \"model\": {\n    \"type\": \"BPE\",\n    \"dropout\": null,\n    \"unk_token\": null,\n");
    out.push_str("    \"continuing_subword_prefix\": null,\n    \"end_of_word_suffix\": null,\n");
    out.push_str("    \"fuse_unk\": false,\n    \"byte_fallback\": false,\n    \"ignore_merges\": false,\n");
    write!(
        out,
        "    \"vocab\": {{{}\n    }},\n    \"merges\": [{}\n    ]\n  }}\n}}\n",
        entries.join(","),
        merges.join(",")
    )
    .expect("writing to a string does not fail");
    Ok(out)
}

fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("a string is always JSON")
}
