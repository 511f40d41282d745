//! Large tables that are looked into at random: in small pages, nearly every look misses the table of pages.

use std::ops::{Deref, DerefMut};

/// Asks the operating system for huge pages, as far as the memory has room for whole ones.
#[cfg(feature = "python")]
pub fn ask_for_huge_pages<T>(memory: &[T]) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        let start = (memory.as_ptr() as usize).next_multiple_of(PAGE);
        let end = memory.as_ptr_range().end as usize / PAGE * PAGE;
        if start < end {
            // SAFETY: whole pages of a live allocation; the advice changes no content, and a refusal changes nothing.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}

/// Plain numbers, of which all zeros is a value.
///
/// # Safety
///
/// All zeros is a value, and 64 a multiple of the alignment.
pub unsafe trait Number: Copy {}
// SAFETY: its alignment is 8.
unsafe impl Number for u64 {}
// SAFETY: its alignment is 4.
unsafe impl Number for [u32; 4] {}

/// Zeros, to be written on, from the start of a huge page where there are any. What is not touched takes no memory.
///
/// The allocator would give memory that was used before, which it has to clear, in small pages.
pub struct Zeros<T: Number> {
    #[cfg(target_os = "linux")]
    start: std::ptr::NonNull<T>,
    #[cfg(target_os = "linux")]
    len: usize,
    #[cfg(not(target_os = "linux"))]
    memory: Vec<T>,
}

#[cfg(target_os = "linux")]
mod mapped {
    use std::alloc::{Layout, handle_alloc_error};
    use std::ptr::{NonNull, null_mut, slice_from_raw_parts_mut};

    use super::{Number, Zeros};

    const HUGE: usize = 2 << 20;

    // SAFETY: the memory is its own, as a vector's.
    unsafe impl<T: Number + Send> Send for Zeros<T> {}
    // SAFETY: as above.
    unsafe impl<T: Number + Sync> Sync for Zeros<T> {}

    impl<T: Number> Zeros<T> {
        /// Where the system has no memory left it ends as a vector does.
        pub fn new(len: usize) -> Self {
            if len == 0 {
                return Self { start: NonNull::dangling(), len };
            }
            let bytes = Self::bytes(len);
            // SAFETY: a new mapping of this process alone. What lies before the first and behind the last huge page is
            // given back; both are whole pages of the mapping, as `HUGE` is a multiple of every page size.
            unsafe {
                let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
                let all = libc::mmap(null_mut(), bytes + HUGE, access, kind, -1, 0);
                if all == libc::MAP_FAILED {
                    handle_alloc_error(Layout::array::<T>(len).expect("a table is far smaller than the address space"));
                }
                let before = (all as usize).wrapping_neg() % HUGE;
                let start = all.byte_add(before);
                if before > 0 {
                    libc::munmap(all, before);
                }
                libc::munmap(start.byte_add(bytes), HUGE - before);
                libc::madvise(start, bytes, libc::MADV_HUGEPAGE);
                Self { start: NonNull::new_unchecked(start.cast()), len }
            }
        }

        fn bytes(len: usize) -> usize {
            (len * size_of::<T>()).next_multiple_of(HUGE)
        }

        pub(super) fn pointer(&self) -> *mut [T] {
            slice_from_raw_parts_mut(self.start.as_ptr(), self.len)
        }
    }

    impl<T: Number> Drop for Zeros<T> {
        fn drop(&mut self) {
            if self.len > 0 {
                // SAFETY: `new` has mapped it, and nobody borrows it.
                unsafe { libc::munmap(self.start.as_ptr().cast(), Self::bytes(self.len)) };
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
impl<T: Number> Zeros<T> {
    pub fn new(len: usize) -> Self {
        // SAFETY: zeros are a value of `T`.
        Self { memory: vec![unsafe { std::mem::zeroed() }; len] }
    }

    fn pointer(&self) -> *mut [T] {
        std::ptr::slice_from_raw_parts_mut(self.memory.as_ptr().cast_mut(), self.memory.len())
    }
}

impl<T: Number> Deref for Zeros<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: the memory is zeros or what was written since, and lives as long as `self`.
        unsafe { &*self.pointer() }
    }
}

impl<T: Number> DerefMut for Zeros<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed alone.
        unsafe { &mut *self.pointer() }
    }
}

impl<T: Number> Default for Zeros<T> {
    fn default() -> Self {
        Self::new(0)
    }
}

impl<T: Number> std::fmt::Debug for Zeros<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Zeros({})", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_zeros_until_they_are_written_and_move_with_their_owner() {
        assert!(Zeros::<u64>::new(0).is_empty());
        for len in [1, 511, (2 << 20) / 8, 300_000] {
            let mut zeros = Zeros::<u64>::new(len);
            assert!(zeros.len() == len && zeros.iter().all(|&zero| zero == 0));
            zeros[len - 1] = 7;
            let moved = std::thread::spawn(move || zeros).join().unwrap();
            assert_eq!(moved[len - 1], 7);
        }
    }
}
