"""What the original study published for these techniques, measured on one A100.

ResNeXt29_4x64d on CIFAR-10, 200 epochs, Adam at 0.01, profiled with Nsight Systems with `emit_nvtx` on. Its single
precision must have been TF32 (docs/original-study.md). A step there starts when the batch is loaded; an epoch includes
the validation.
"""

SETUP = "ResNeXt29_4x64d, CIFAR-10, one A100"
MODEL, DATASET, LEARNING_RATE = "resnext29_4x64d", "cifar10", 0.01

# (batch size, arm of the table) -> milliseconds, seconds, 1e9 bytes.
DATA_LOADER = {
    (128, "2 workers"): {"load_ms": 1.6, "step_ms": 104, "epoch_s": 44.5},
    (128, "0 workers"): {"load_ms": 63, "step_ms": 104, "epoch_s": 67.7},
    (128, "1 worker"): {"load_ms": 1.9, "step_ms": 105, "epoch_s": 44.6},
    (128, "4 workers"): {"load_ms": 1.6, "step_ms": 104, "epoch_s": 44.7},
    (128, "8 workers"): {"load_ms": 1.6, "step_ms": 104, "epoch_s": 44.9},
}
MIXED_PRECISION = {
    (128, "single"): {"step_ms": 104, "epoch_s": 44.5, "overall_s": 8934},
    (128, "fp16"): {"step_ms": 78, "epoch_s": 33.7, "overall_s": 6744},
}
CHECKPOINTING = {
    (128, "none"): {"optimizer_ms": 28, "step_ms": 104, "epoch_s": 44.5, "overall_s": 8934, "memory_gb": 7.82},
    (128, "nested"): {"optimizer_ms": 34, "step_ms": 152, "epoch_s": 63.5, "overall_s": 12703, "memory_gb": 5.11},
    (512, "none"): {"optimizer_ms": 200, "step_ms": 380, "epoch_s": 40.0, "overall_s": 8097, "memory_gb": 33.79},
    (896, "nested"): {"optimizer_ms": 560, "step_ms": 948, "epoch_s": 56.5, "overall_s": 11302, "memory_gb": 33.93},
}
