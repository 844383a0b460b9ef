"""DeepSpeed's settings are a pure function of ours, and the batch is split without dropping a sample."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainscale.config import Config, InputError, load
from brainscale.engine import batch_split, deepspeed_config


def test_settings_for_fp32():
    config = load(Config, None, ('train.precision="fp32"', "train.global_batch_volumes=8", "train.grad_clip=0.5"))
    assert deepspeed_config(config, 2) == {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "steps_per_print": 2**31,
        "zero_optimization": {
            "stage": 1,
            "overlap_comm": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
        "zero_force_ds_cpu_optimizer": False,
    }


def test_bf16_accumulates_in_fp32_at_stage_2():
    config = load(Config, None, ("train.global_batch_volumes=64", "train.micro_batch_volumes=8"))
    one, many = deepspeed_config(config, 8), deepspeed_config(config, 2)
    assert one["zero_optimization"]["stage"] == 1 and "data_types" not in one
    assert many["zero_optimization"]["stage"] == 2 and many["data_types"] == {"grad_accum_dtype": "fp32"}
    assert one["bf16"] == many["bf16"] == {"enabled": True}
    assert one["communication_data_type"] == many["communication_data_type"] == "fp32"


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 8))
def test_split_covers_the_global_batch(share, limit, ranks):
    config = load(Config, None, (f"train.global_batch_volumes={share * ranks}", f"train.micro_batch_volumes={limit}"))
    micro, accumulation = batch_split(config, ranks)
    assert micro * accumulation * ranks == share * ranks
    assert micro <= limit


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(InputError, match="= 8 is no multiple of 3 ranks"):
        batch_split(load(Config, None, ("train.global_batch_volumes=8",)), 3)
