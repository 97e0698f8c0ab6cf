"""The networks: backbones, the keypoint-estimation block (KPE), losses, checkpoints and the zoo of trained weights.

Invariant: every network is made of operators that all backends quantise (no transposed convolution), and its forward
pass maps (N, 3, h, w) float32 to a tuple of tensors in the order of `ModelSpec.outputs`.
"""
