"""What the server of `processes` imports before it forks. (distributed first: it tells DeepSpeed about the device.)"""

import importlib

for name in (
    "brainscale.distributed", "brainscale.cli", "brainscale.report", "brainscale.train", "torch._dynamo.aot_compile",
    "torch._dynamo.convert_frame", "deepspeed.runtime.zero.muon.original_muon",
):  # fmt: skip
    importlib.import_module(name)
