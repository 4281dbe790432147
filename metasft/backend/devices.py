"""The device of this process and the process group, as veRL chooses them."""

from verl.utils.device import get_device_id, get_device_name, get_torch_device
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

__all__ = [
    "destroy_global_process_group",
    "get_device_id",
    "get_device_name",
    "get_torch_device",
    "initialize_global_process_group",
]
