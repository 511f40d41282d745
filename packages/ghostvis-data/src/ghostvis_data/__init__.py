"""Data for GhostVis: sources, webdataset shards, packing, a resumable loader, tasks with their scores, and the tiny world."""
