"""What the C library does with big buffers that torch gives back."""

import ctypes
import sys

# glibc's names for the two settings, from its malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Have this process keep the memory it frees, to use it again, rather than return it to the system.

    By default glibc maps every buffer of more than 32 MiB (at first even of 128 KiB) anew and unmaps it when it is
    freed, so the system hands out the same pages again, one fault and one clearing each: for the activations of a
    training step that can take longer than computing them. Kept buffers cost nothing the second time. The price is
    that the process stays as large as it ever was until it ends: right for a training run or a benchmark, which is
    why only those call it, and for the program to decide, which is why importing coterie does not.

    Call it once, early; calling it again changes nothing. It acts on the whole process, and on what is allocated after
    it. See mallopt(3), M_MMAP_MAX and M_TRIM_THRESHOLD.

    Returns:
        Whether it took effect: False on anything but Linux with glibc (macOS, Windows, musl), where nothing is done.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):  # musl has a mallopt too, which does nothing
        return False
    return bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, -1))
