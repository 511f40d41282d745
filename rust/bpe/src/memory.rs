//! Advice to the operating system.

/// A random look into megabytes misses the table of small pages nearly every time.
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
