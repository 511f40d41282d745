//! Pieces on their way into a hash table, some at a time, so that the table's cache lines arrive while others are cut.

use crate::runs::prefetch;

/// Pieces under way at once: enough to hide a miss of the last cache, few enough to stay in the first.
pub const CHUNK: usize = 128;
/// The longest piece that is its own key.
pub const SHORT: usize = 15;

/// A piece of 1 to `SHORT` bytes with its length in the last byte: never zero, and no two pieces share one.
/// Zero stands for a longer piece.
pub type Key = u128;

#[derive(Debug, Clone, Copy, Default)]
pub struct Item {
    pub key: Key,
    pub hash: u64,
    pub start: u32,
    pub len: u32,
}

impl Item {
    #[inline(always)]
    pub fn bytes(self, text: &[u8]) -> &[u8] {
        &text[self.start as usize..(self.start + self.len) as usize]
    }
}

/// By the length of a piece: the bits that are its bytes, and its length in the last byte.
const MASKS: [(u128, u128); SHORT + 1] = {
    let mut masks = [(0, 0); SHORT + 1];
    let mut len = 1;
    while len <= SHORT {
        masks[len] = ((1 << (8 * len)) - 1, (len as u128) << 120);
        len += 1;
    }
    masks
};

/// The key of `text[start..start + len]`; `len` is at most `SHORT`.
#[inline(always)]
pub fn key_of(text: &[u8], start: usize, len: usize) -> Key {
    let block = match text.get(start..start + 16) {
        Some(block) => u128::from_le_bytes(block.try_into().expect("the range has 16 bytes")),
        None => {
            let mut block = [0u8; 16];
            block[..len].copy_from_slice(&text[start..start + len]);
            u128::from_le_bytes(block)
        }
    };
    let (bytes, last) = MASKS[len];
    (block & bytes) | last
}

#[inline(always)]
pub fn hash_of(key: Key) -> u64 {
    // Two halves, each whitened, multiplied to 128 bits and folded: every bit of the key reaches the low bits.
    let low = key as u64 ^ 0x9e37_79b9_7f4a_7c15;
    let high = (key >> 64) as u64 ^ 0xd1b5_4a32_d192_ed03;
    let product = u128::from(low) * u128::from(high);
    product as u64 ^ (product >> 64) as u64
}

/// The bytes of a key.
pub fn key_bytes(key: &[u8; 16]) -> &[u8] {
    &key[..key[15] as usize]
}

#[derive(Debug)]
pub struct Chunk {
    items: [Item; CHUNK],
    len: usize,
}

impl Default for Chunk {
    fn default() -> Self {
        Self { items: [Item::default(); CHUNK], len: 0 }
    }
}

impl Chunk {
    /// Adds `text[start..start + len]`, and asks for `place(hash)`. True when the chunk is full.
    #[inline(always)]
    pub fn push<'a, T: 'a>(&mut self, text: &[u8], start: usize, len: usize, place: impl Fn(u64) -> &'a T) -> bool {
        let mut item = Item { start: start as u32, len: len as u32, ..Item::default() };
        if len <= SHORT {
            item.key = key_of(text, start, len);
            item.hash = hash_of(item.key);
            prefetch(place(item.hash));
        }
        self.items[self.len] = item;
        self.len += 1;
        self.len == CHUNK
    }

    pub fn len(&self) -> usize {
        self.len
    }

    #[inline(always)]
    pub fn key(&self, i: usize) -> (Key, u64) {
        (self.items[i].key, self.items[i].hash)
    }

    #[inline(always)]
    pub fn item(&self, i: usize) -> Item {
        self.items[i]
    }

    pub fn clear(&mut self) {
        self.len = 0;
    }
}
