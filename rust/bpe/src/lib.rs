//! Byte-level BPE: train, encode, decode.
//!
//! ```
//! use ghostvis_bpe::{Encoding, Pattern, Scratch, Trainer, Vocab};
//!
//! # fn main() -> ghostvis_bpe::Result<()> {
//! let pattern = Pattern::new("ghostvis")?;
//! let mut trainer = Trainer::new(pattern.clone(), 1);
//! trainer.feed(&["the cat and the hat", "the bat"])?;
//! let merges = trainer.finish(8, 1, |_| Ok(()))?;
//! let bytes: Vec<u8> = (0..=255).collect();
//! let encoding = Encoding::new(Vocab::from_merges(&bytes, &merges)?, pattern, vec![("<|bos|>".into(), 300)])?;
//! let mut ids = Vec::new();
//! encoding.encode_ordinary("the rat", &mut Scratch::default(), &mut ids)?;
//! assert_eq!(encoding.decode_bytes(&ids)?, b"the rat");
//! # Ok(())
//! # }
//! ```

mod backtrack;
mod cache;
mod chunk;
mod classes;
mod count;
mod encode;
mod encoding;
mod error;
pub mod file;
pub mod hf;
mod lanes;
mod memory;
mod merge;
mod pairs;
#[cfg(feature = "python")]
mod python;
mod repeat;
mod runs;
mod scanner;
mod short;
mod split;
mod threads;
mod train;
mod unknown;
mod vocab;
mod window;

pub use encode::Scratch;
pub use encoding::{Encoding, Specials};
pub use error::{Error, Result};
pub use split::{PRESETS, Pattern, Pieces};
pub use threads::all_cores;
pub use train::{MAX_VOCAB_SIZE, TieBreak, Trainer, check_sizes};
pub use vocab::Vocab;
