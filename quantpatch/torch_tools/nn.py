"""``torch.nn`` as torch defined it, for the classes that layers stand on and that models are searched for.

A library may have put classes of its own under torch's names before quantpatch is imported. What torch's
classes are is seen where they are defined, and by what they say of themselves.
"""

from __future__ import annotations

from torch.nn.modules.activation import *  # noqa: F403
from torch.nn.modules.batchnorm import *  # noqa: F403
from torch.nn.modules.container import *  # noqa: F403
from torch.nn.modules.conv import *  # noqa: F403
from torch.nn.modules.instancenorm import *  # noqa: F403
from torch.nn.modules.linear import *  # noqa: F403
from torch.nn.modules.module import Module as Module
from torch.nn.modules.pooling import *  # noqa: F403
from torch.nn.modules.rnn import *  # noqa: F403
from torch.nn.modules.sparse import *  # noqa: F403
from torch.nn.modules.transformer import *  # noqa: F403
from torch.nn.parallel.data_parallel import DataParallel as DataParallel
from torch.nn.parallel.distributed import DistributedDataParallel as DistributedDataParallel
from torch.nn.parameter import Parameter as Parameter

for _name, _found in list(globals().items()):
    # What was rebound even where it is defined has torch's own among its bases.
    for _class in getattr(_found, "__mro__", ()):
        if _class.__qualname__ == _name and _class.__module__.startswith("torch.nn."):
            globals()[_name] = _class
            break
