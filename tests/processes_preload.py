"""What the server of `processes` imports before it forks. (distributed first: it tells DeepSpeed about the device.)"""

import brainscale.cli
import brainscale.distributed
import brainscale.report
import brainscale.train  # noqa: F401
