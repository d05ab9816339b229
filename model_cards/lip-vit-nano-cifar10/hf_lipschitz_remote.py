# SPDX-License-Identifier: Apache-2.0
"""Forwards to the installed package hf-lipschitz, which holds the code of this model.

Load this folder with `import hf_lipschitz` first and without trust_remote_code, or with trust_remote_code=True.
"""

import re

try:
    import hf_lipschitz
except ImportError as error:
    raise ImportError(
        "This model needs the package hf-lipschitz, which is not installed or cannot be imported here: "
        "run `pip install hf-lipschitz` and load the model again."
    ) from error

_MINIMUM = (0, 1)


def _numbers(version):
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", version)[0].split("."))


if _numbers(hf_lipschitz.__version__) < _MINIMUM:
    raise ImportError(
        f"This model needs hf-lipschitz {'.'.join(map(str, _MINIMUM))} or newer, and {hf_lipschitz.__version__} is "
        "installed: run `pip install --upgrade hf-lipschitz` and load the model again."
    )


def __getattr__(name):
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in hf_lipschitz.__all__:
        raise AttributeError(
            f"This model needs {name}, which hf-lipschitz {hf_lipschitz.__version__} does not have: "
            "run `pip install --upgrade hf-lipschitz` and load the model again."
        )
    return getattr(hf_lipschitz, name)
