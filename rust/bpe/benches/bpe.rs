//! Times of the crate without Python: `cargo bench -p ghostvis-bpe`, or `cargo bench -p ghostvis-bpe -- FILE` for a UTF-8
//! file with zero bytes between its documents, as `benchmarks/corpus.py` writes. The peers are in `benchmarks/bench.py`.

use std::error::Error;
use std::fmt::Write as _;
use std::time::Instant;

use ghostvis_bpe::{Encoding, Pattern, Scratch, Trainer, Vocab};

const VOCAB_SIZE: usize = 32_768;
const RUNS: usize = 5;

fn main() -> Result<(), Box<dyn Error>> {
    // Cargo adds `--bench`.
    let file = std::env::args().skip(1).find(|argument| !argument.starts_with("--"));
    let text = match &file {
        Some(path) => std::fs::read_to_string(path)?,
        None => made_up(20_000_000),
    };
    let texts: Vec<&str> = text.split('\0').collect();
    let megabytes = text.len() as f64 / 1e6;
    println!(
        "{}: {megabytes:.1} MB, {} texts, median of {RUNS}, wall time",
        file.as_deref().unwrap_or("made-up words"),
        texts.len()
    );

    let mut merges = Vec::new();
    let time = median(|| {
        let mut trainer = Trainer::new(Pattern::new("ghostvis")?, 1);
        trainer.feed(&texts)?;
        merges = trainer.finish(VOCAB_SIZE - 256, 1, |_| Ok(()))?;
        Ok(())
    })?;
    println!("train to {}, one thread     {time:8.3} s", merges.len() + 256);

    let bytes: Vec<u8> = (0..=255).collect();
    let load = || Encoding::new(Vocab::from_merges(&bytes, &merges)?, Pattern::new("ghostvis")?, Vec::new());
    let time = median(|| load().map(drop))?;
    println!("an encoding from merges         {:8.1} ms", time * 1e3);

    let mut ids = Vec::new();
    let encode = |encoding: &Encoding, scratch: &mut Scratch, ids: &mut Vec<u32>| {
        ids.clear();
        texts.iter().try_for_each(|text| encoding.encode_ordinary(text, scratch, ids))
    };
    let time = median(|| encode(&load()?, &mut Scratch::default(), &mut ids))?;
    println!("encode, first pass              {:8.1} MB/s", megabytes / time);
    let (encoding, mut scratch) = (load()?, Scratch::default());
    encode(&encoding, &mut scratch, &mut ids)?;
    let time = median(|| encode(&encoding, &mut scratch, &mut ids))?;
    println!("encode, repeated                {:8.1} MB/s", megabytes / time);
    let time = median(|| encoding.decode_bytes(&ids).map(drop))?;
    println!("decode                          {:8.1} MB/s", megabytes / time);

    let letters = made_up(1_000_000).replace(' ', "");
    let time = median(|| {
        ids.clear();
        encoding.encode_ordinary(&letters, &mut scratch, &mut ids)
    })?;
    println!("one word of {} letters      {:8.1} MB/s", letters.len(), letters.len() as f64 / 1e6 / time);
    Ok(())
}

/// The median of the seconds that `work` takes.
fn median(mut work: impl FnMut() -> ghostvis_bpe::Result<()>) -> ghostvis_bpe::Result<f64> {
    let mut times = Vec::with_capacity(RUNS);
    for _ in 0..RUNS {
        let start = Instant::now();
        work()?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[RUNS / 2])
}

/// Words of random letters, some of them far more often than others.
fn made_up(bytes: usize) -> String {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let words: Vec<String> = (0..50_000)
        .map(|_| {
            (0..2 + random() % 9).map(|_| char::from(b"etaoinshrdlcumwfgypbvkjxqz"[(random() % 26) as usize])).collect()
        })
        .collect();
    let mut text = String::with_capacity(bytes + 16);
    while text.len() < bytes {
        let (first, second) = (random() as usize % words.len() + 1, random() as usize % words.len() + 1);
        write!(text, "{} ", words[first * second / (words.len() + 1) * first / (words.len() + 1)])
            .expect("writing to a string does not fail");
    }
    text
}
