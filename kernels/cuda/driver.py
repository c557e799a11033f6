"""The calls of CUDA's driver, for one GPU.

They work on the GPU's primary context, which is torch's as well, so addresses and streams are shared with it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ...errors import CudaError, CudaUnavailableError
from .. import _native
from .compilers import NO_BINDINGS
from .prepared import Launch
from .reach import Allocation

BATCHES_SINCE = (
    13000  # cuMemcpyBatchAsync as it is called here; that of CUDA 12.8 had another signature
)
END_OF_MEMORY = 1 << 64
LEGACY_STREAM = 0, 1  # a batch of copies goes to no such stream


class Gpu:
    """One GPU.

    Args:
        index: among those that are visible.

    Attributes:
        arch: of its kernels, as sm_90.
        sms: how many multiprocessors it has.
        batches: many copies may be one call.

    Raises:
        CudaUnavailableError: no driver, no such GPU, or no `cuda.bindings`.
    """

    def __init__(self, index: int) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise CudaUnavailableError(NO_BINDINGS) from error
        self._driver: Any = driver
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:  # also what cuda.bindings raises where there is no library
            raise CudaUnavailableError(f"no NVIDIA driver answers here: {error}") from error
        try:
            (self._device,) = self._call("cuDeviceGet", index)
            self.arch = f"sm_{self._attribute('COMPUTE_CAPABILITY_MAJOR')}"
            self.arch += str(self._attribute("COMPUTE_CAPABILITY_MINOR"))
            self.sms = self._attribute("MULTIPROCESSOR_COUNT")
            self._reads_any_memory = bool(self._attribute("PAGEABLE_MEMORY_ACCESS"))
            (version,) = self._call("cuDriverGetVersion")
            (self._context,) = self._call("cuDevicePrimaryCtxRetain", self._device)
        except CudaError as error:
            raise CudaUnavailableError(f"GPU {index} cannot be used: {error}") from error
        self.batches = version >= BATCHES_SINCE and callable(vars(driver).get("cuMemcpyBatchAsync"))
        self._module: Any = None
        self._kernels: dict[str, Any] = {}

    @contextmanager
    def current(self) -> Iterator[None]:
        """Calls of this thread are for this GPU. All below are made within it."""
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def load(self, cubin: bytes, source: str) -> None:
        """Takes the kernels.

        Raises:
            CudaUnavailableError: the driver does not take what `source` made, or it is not all of them.
        """
        try:
            (module,) = self._call("cuModuleLoadData", cubin)
        except CudaError as error:
            raise CudaUnavailableError(
                f"the driver takes no cubin of {source}: {error}; "
                "a compiler no newer than the driver's CUDA would do"
            ) from error
        try:
            kernels = {
                name: self._call("cuModuleGetFunction", module, name.encode())[0]
                for name in _native.kernels()
            }
        except CudaError as error:
            self._call("cuModuleUnload", module)
            raise CudaUnavailableError(
                f"not all kernels are in what {source} made: {error}"
            ) from error
        self._module, self._kernels = module, kernels

    def close(self) -> None:
        """Gives all of it back. The GPU must be past every launch. No other call may follow, but this one again."""
        if self._context is None:
            return
        if self._module is not None:
            with self.current():
                self._call("cuModuleUnload", self._module)
        self._module = self._context = None
        self._call("cuDevicePrimaryCtxRelease", self._device)

    def launch(self, launch: Launch, stream: int) -> None:
        """Enqueues a kernel. Its parameter is read before this returns."""
        params = ctypes.create_string_buffer(launch.params, len(launch.params))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        self._call(
            "cuLaunchKernel",
            self._kernels[launch.kernel],
            *(launch.blocks, 1, 1),
            *(_native.THREADS, 1, 1),
            0,
            self._driver.CUstream(stream),
            ctypes.addressof(pointers),
            0,
        )

    def copy(self, dst: int, src: int, size: int, stream: int) -> None:
        """Enqueues a copy."""
        pointer = self._driver.CUdeviceptr
        self._call("cuMemcpyAsync", pointer(dst), pointer(src), size, self._driver.CUstream(stream))

    def copy_batch(
        self, dst: Sequence[int], src: Sequence[int], sizes: Sequence[int], stream: int
    ) -> None:
        """Enqueues many copies, in one call where the driver takes them so."""
        if not self.batches or stream in LEGACY_STREAM:
            for each in zip(dst, src, sizes, strict=True):
                self.copy(*each, stream)
            return
        driver = self._driver
        how = driver.CUmemcpyAttributes()
        how.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        how.flags = driver.CUmemcpyFlags.CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE
        self._call(
            "cuMemcpyBatchAsync",
            [driver.CUdeviceptr(each) for each in dst],
            [driver.CUdeviceptr(each) for each in src],
            list(sizes),
            len(sizes),
            [how],
            [0],
            1,
            driver.CUstream(stream),
        )

    def allocation_at(self, address: int) -> Allocation:
        """What memory an address is in, that kernels are to reach.

        Raises:
            ValueError: they would not: memory of the host that is not pinned, on a GPU that needs it pinned.
        """
        try:
            seen = self._pointer("DEVICE_POINTER", address)
            kind = self._pointer("MEMORY_TYPE", address)
        except CudaError:
            if self._reads_any_memory:
                return Allocation(address, END_OF_MEMORY, on_host=True)
            raise ValueError(
                f"memory: the GPU does not reach {address:#x}; "
                "pin host memory (pin_memory=True, or SlabTier.pin_memory)"
            ) from None
        if seen != address:
            raise ValueError(f"memory: {address:#x} has another address on the GPU")
        start = self._pointer("RANGE_START_ADDR", address)
        end = start + self._pointer("RANGE_SIZE", address)
        return Allocation(
            start, end, on_host=kind == int(self._driver.CUmemorytype.CU_MEMORYTYPE_HOST)
        )

    def _pointer(self, name: str, address: int) -> int:
        attribute = getattr(self._driver.CUpointer_attribute, f"CU_POINTER_ATTRIBUTE_{name}")
        (value,) = self._call("cuPointerGetAttribute", attribute, self._driver.CUdeviceptr(address))
        return int(value)

    def _attribute(self, name: str) -> int:
        attribute = getattr(self._driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        (value,) = self._call("cuDeviceGetAttribute", attribute, self._device)
        return int(value)

    def _call(self, name: str, *args: object) -> Any:
        result, *values = vars(self._driver)[name](*args)
        if result != self._driver.CUresult.CUDA_SUCCESS:
            _, said = self._driver.cuGetErrorString(result)
            text = said.decode() if said else ""
            raise CudaError(f"{name}: {result.name} ({text})")
        return values
