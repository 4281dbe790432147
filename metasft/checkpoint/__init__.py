"""What a training leaves behind: exports, and whether a model folder is whole."""
