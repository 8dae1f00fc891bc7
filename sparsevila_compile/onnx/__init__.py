"""ONNX bundles: what a program becomes, the directory that holds it, and ONNX Runtime as its runner."""
