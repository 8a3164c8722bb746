"""Token masking for video masked autoencoders as Gymnasium environments.

``TATSMasking-v0`` decides on a mask at once, ``TATSMaskingSequential-v0`` in rounds. Importing the package registers
them; torch is loaded only when one is made.
"""

from importlib.metadata import PackageNotFoundError, version

from gymnasium.envs.registration import register

try:
    __version__ = version("tats-env")
except PackageNotFoundError:  # a source tree on the path that was never installed
    __version__ = "0+unknown"

register(
    id="TATSMasking-v0",
    entry_point="tats_env.env:TATSMaskingEnv",
    vector_entry_point="tats_env.vector_env:TATSMaskingVectorEnv",
)
register(
    id="TATSMaskingSequential-v0",
    entry_point="tats_env.sequential:TATSMaskingSequentialEnv",
    vector_entry_point="tats_env.sequential:TATSMaskingSequentialVectorEnv",
)
