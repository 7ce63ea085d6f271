"""What makes a recipe that trains and quantizes small enough for a test."""

TINY = [
    "data.name=shapes10",
    "data.max_train=64",
    "data.max_test=40",
    "data.batch_size=16",
    "train.epochs=1",
    "quant.calibration_batches=2",
    "quant.target=x86_avx2",
    "quant.analyze=false",
    "accelerator=cpu",
    "progress=false",
]
