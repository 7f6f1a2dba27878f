"""The quickstart: RecA itself on real photographs, small enough for two CPU cores and three minutes."""

from __future__ import annotations

from reca.config import CheckpointConfig, ComputeConfig, DataConfig, OptimConfig, SampleConfig, TrainConfig

_STEPS = 300


def quickstart() -> TrainConfig:
    """RecA on `bagel/quickstart`, the same classes as BAGEL-7B-MoT with 1.9 M parameters, and 57 photographs.

    It starts from shipped weights that see pictures (32 px) and make pictures (64 px), but not the same ones.
    """
    return TrainConfig(
        recipe="quickstart",
        model="bagel/quickstart",
        weights="package:quickstart",
        data=DataConfig(
            path="package:photos",
            prompt_dropout=0.1,  # as in the official recipe
            images=16,  # about 80 passes over the 57 photographs in 300 steps
            workers=0,  # decoding takes a few milliseconds; a worker takes seconds to start
        ),
        optim=OptimConfig(
            lr=1e-2,  # highest of those tried that still helps; 4e-5 is for 7 B parameters
            eps=1e-8,  # gradients of a small model are not small enough to need 1e-15
            schedule="cosine",  # the last steps settle what the first ones found
            warmup_steps=20,
        ),
        compute=ComputeConfig(
            precision="fp32",  # bf16 gains nothing on a CPU
            threads=1,  # so small a model gains little from a second thread, and loses much if a core is busy
        ),
        sample=SampleConfig(
            images=6,  # all that are held out
            steps=20,  # enough for 64 latent tokens
            shift=1.0,  # the shift of training
        ),
        checkpoint=CheckpointConfig(every=50, keep=1),  # a kill costs a quarter of a minute at most
        timestep_shift=2.0,  # what a picture shows is decided where there is most noise
        steps=_STEPS,
        seed=0,
        log_every=10,
    )
