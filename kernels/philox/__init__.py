"""Random numbers of samples as a function of their coordinates: words, uniforms or normals in one launch."""
