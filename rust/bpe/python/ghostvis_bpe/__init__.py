"""Byte-level BPE in Rust."""
