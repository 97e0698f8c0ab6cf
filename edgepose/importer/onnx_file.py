"""A foreign ONNX file, checked as data: nothing in it is executed, built or allocated by what it claims before this.

Invariant: what is returned is one self-contained graph of operators that ONNX knows, in an order in which they can be
executed, whose tensors hold as many values as they say; anything else is an `OnnxError` that names the place.
"""

from __future__ import annotations

import graphlib
import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]  # no stubs are installed
from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from onnx.inliner import inline_local_functions

from edgepose.errors import OnnxError
from edgepose.strict_yaml import did_you_mean

MAX_BYTES = 2**31 - 1
"""Of the file, of all its weights, and of any value of the graph at batch 1: what Protobuf can hold."""

_OLDEST = 7  # opset; ONNX Runtime promises nothing for older ones
_DOMAINS = ("", "ai.onnx")
_WORDS = {"location", "offset", "length", "checksum"}


@dataclass(frozen=True, slots=True, eq=False)
class OnnxFile:
    """A checked file.

    Attributes:
        path: Where it was read from.
        model: Self-contained: external data was read in, functions were inlined, initialisers are no inputs.
        digest: Sha256 of the file and of its external data.
        opset: Its operator set.
        notes: What was found and changed, for people.
    """

    path: Path
    model: ModelProto
    digest: str
    opset: int
    notes: tuple[str, ...]


def read_onnx(path: Path) -> OnnxFile:
    """Reads and checks a file.

    Raises:
        OnnxError: It is missing, too big, truncated or no ONNX file; it is cyclic, reads values that nothing produces,
            has operators or domains that ONNX does not know, dimensions below 0 or tensors that are not as big as they
            say; or its external data is missing, too short or outside its folder.
    """
    raw = _bytes_of(path)
    model = ModelProto()
    try:
        model.ParseFromString(raw)
    except DecodeError as err:
        fix = "check that the file is complete and no Git LFS pointer"
        raise OnnxError(str(path), found="bytes that are no ONNX file, or a part of one", fix=fix) from err
    where = str(path)
    if not _is_text(model):
        raise OnnxError(where, found="names that are no text", expected="a whole file", fix="copy or export it again")
    if not model.HasField("graph") or not model.graph.node:
        raise OnnxError(where, found="a file without a graph", expected="an ONNX network", fix="check the file")
    if model.ir_version > onnx.IR_VERSION:
        found = f"IR version {model.ir_version}"
        raise OnnxError(where, found=found, expected=f"at most {onnx.IR_VERSION}", fix="update onnx, or export again")
    notes: list[str] = []
    opset = _opset_of(model, where)
    digest = hashlib.sha256(raw)
    _take_external_data(model, path, digest, notes)
    for tensor, place in _tensors(model):
        _check_tensor(tensor, f"{where}: {place}")
    if sum(tensor.ByteSize() for tensor, _ in _tensors(model)) > MAX_BYTES:
        raise OnnxError(where, found="weights of more than 2 GB", expected="a network for a small device")
    model = _inlined(model, opset, where, notes)
    _tidy(model, notes)
    _check_values(model.graph, where)
    _check_nodes(model.graph, opset, where, set())
    _sort(model.graph, where, notes)
    check_graph(model, where)
    return OnnxFile(path, model, digest.hexdigest(), opset, tuple(notes))


def check_graph(model: ModelProto, where: str) -> ModelProto:
    """ONNX's own checks, and no value bigger than can be held; returns the model with the shapes that follow.

    Raises:
        OnnxError: The graph breaks a rule, or computes a value of more than 2 GB at batch 1.
    """
    try:
        bare = ModelProto.FromString(model.SerializeToString())
        for value in bare.graph.output:  # what a file says of their shapes is often out of date
            value.type.tensor_type.shape.SetInParent()  # the checker wants any
        onnx.checker.check_model(bare)
        for value in bare.graph.output:
            value.type.tensor_type.ClearField("shape")
        inferred = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as err:
        raise OnnxError(where, found=_first_lines(err), expected="a valid ONNX graph") from err
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        _check_claim(value, where)
    return inferred


def real_inputs(graph: GraphProto) -> list[onnx.ValueInfoProto]:
    """Inputs that are not initialisers."""
    held = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in held]


def dims_of(value: onnx.ValueInfoProto) -> tuple[int | str, ...] | None:
    """The dimensions of a tensor, names where they are free ("" without a name); None where even their number is."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.WhichOneof("value") == "dim_value" else dim.dim_param for dim in tensor.shape.dim)


def _bytes_of(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise OnnxError(str(path), found="no file", expected="an ONNX file", fix="check the path")
        if size > MAX_BYTES:
            raise OnnxError(str(path), found=f"{size / 1e9:.1f} GB", expected="at most 2 GB, as Protobuf allows")
        raw = path.read_bytes()
    except OSError as err:
        found = err.strerror or "an unreadable file"
        raise OnnxError(str(path), found=found, expected="an ONNX file", fix="check the path") from err
    if not raw:
        raise OnnxError(str(path), found="an empty file", expected="an ONNX file")
    return raw


def _is_text(message: Message) -> bool:
    """Whether every text is one: Protobuf gives what is no UTF-8 as bytes, and libraries do not expect that."""
    for kind, value in message.ListFields():
        if kind.type == kind.TYPE_STRING:
            if not all(isinstance(text, str) for text in ((value,) if isinstance(value, (str, bytes)) else value)):
                return False
        elif kind.type == kind.TYPE_MESSAGE:
            parts = (value,) if isinstance(value, Message) else value
            if not all(_is_text(part) for part in parts):
                return False
    return True


def _opset_of(model: ModelProto, where: str) -> int:
    local = {function.domain for function in model.functions}
    versions = [entry.version for entry in model.opset_import if entry.domain in _DOMAINS]
    foreign = [entry.domain for entry in model.opset_import if entry.domain not in (*_DOMAINS, *local)]
    used = {node.domain for node in _all_nodes(model.graph.node)}
    if strange := [domain for domain in foreign if domain in used]:
        raise _strange_domain(strange[0], where)
    if len(set(versions)) != 1:
        raise OnnxError(f"{where}: opset", found=f"{versions or 'none'}", expected="exactly one")
    newest = onnx.defs.onnx_opset_version()
    if not _OLDEST <= versions[0] <= newest:
        fix = "export the network again with a newer opset" if versions[0] < _OLDEST else "update onnx, or export again"
        raise OnnxError(f"{where}: opset", found=str(versions[0]), expected=f"{_OLDEST} to {newest}", fix=fix)
    return int(versions[0])


def _strange_domain(domain: str, where: str) -> OnnxError:
    fix = "export the network without operators of one runtime only (plug-ins, quantised or fused operators)"
    return OnnxError(where, found=f"operators of the domain {domain!r}", expected="operators of ONNX itself", fix=fix)


def _all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Nodes, and those of the graphs in their attributes."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _all_nodes(graph.node)


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _graphs(inner)


def _tensors(model: ModelProto) -> Iterator[tuple[TensorProto, str]]:
    """Every tensor of a model, and what to call it."""
    for graph in _graphs(model.graph):
        if graph.sparse_initializer:
            raise OnnxError("ONNX file", found="sparse initialisers", expected="dense ones", fix="export again")
        for tensor in graph.initializer:
            yield tensor, f"initialiser {tensor.name!r}"
    for node in _all_nodes((*model.graph.node, *(node for function in model.functions for node in function.node))):
        for attribute in node.attribute:
            for tensor in (*((attribute.t,) if attribute.HasField("t") else ()), *attribute.tensors):
                yield tensor, f"{node.op_type} {node.name!r}: attribute {attribute.name}"
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise OnnxError("ONNX file", found="sparse constants", expected="dense ones", fix="export again")


def _take_external_data(model: ModelProto, path: Path, digest: hashlib._Hash, notes: list[str]) -> None:
    """Reads in what lies in other files, all of which must be in the model's own folder."""
    folder = path.resolve().parent
    seen: dict[str, bytes] = {}
    for tensor, place in _tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        where = f"{path}: {place}: external data"
        said = {entry.key: entry.value for entry in tensor.external_data}
        name = said.get("location", "")
        if not set(said) <= _WORDS or not name:
            raise OnnxError(where, found=f"{sorted(said)}", expected="location, and perhaps offset and length")
        if name not in seen:
            seen[name] = _external_file(folder, name, where)
            digest.update(name.encode() + b"\0" + hashlib.sha256(seen[name]).digest())
        offset, length = (_whole(said.get(key), where, key) for key in ("offset", "length"))
        start = offset or 0
        stop = len(seen[name]) if length is None else start + length
        if stop > len(seen[name]):
            found = f"bytes {start} to {stop} of {name}, which has {len(seen[name])}"
            raise OnnxError(where, found=found, expected="bytes that are there", fix="copy the file again")
        tensor.raw_data = seen[name][start:stop]
        tensor.ClearField("external_data")
        tensor.data_location = TensorProto.DEFAULT
    if seen:
        notes.append(f"weights were read from {', '.join(sorted(seen))}")


def _external_file(folder: Path, name: str, where: str) -> bytes:
    fix = "put the file beside the model"
    try:
        place = (folder / name).resolve()
        if "\0" in name or "\\" in name or Path(name).is_absolute() or not place.is_relative_to(folder):
            raise OnnxError(where, found=f"the place {name!r}", expected="a file in the model's folder", fix=fix)
        if not place.is_file():
            raise OnnxError(where, found=f"no file {name!r}", expected="a file in the model's folder", fix=fix)
        if place.stat().st_size > MAX_BYTES:
            raise OnnxError(where, found=f"{place.stat().st_size / 1e9:.1f} GB", expected="at most 2 GB")
        return place.read_bytes()
    except (OSError, ValueError) as err:
        raise OnnxError(where, found=f"{name!r} cannot be read ({err})", expected="a readable file", fix=fix) from err


def _whole(text: str | None, where: str, key: str) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise OnnxError(where, found=f"{key} {text!r}", expected="a whole number, 0 or more")
    return int(text)


def _check_tensor(tensor: TensorProto, where: str) -> None:
    if any(size < 0 for size in tensor.dims):
        raise OnnxError(where, found=f"dimensions {list(tensor.dims)}", expected="0 or more")
    if tensor.data_type == TensorProto.STRING:
        return
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except KeyError as err:
        raise OnnxError(where, found=f"the type {tensor.data_type}", expected="a type that ONNX has") from err
    count = math.prod(tensor.dims)
    size = count * dtype.itemsize
    if size > MAX_BYTES:
        raise OnnxError(where, found=f"dimensions {list(tensor.dims)}, {size / 1e9:.1f} GB", expected="at most 2 GB")
    name = onnx.TensorProto.DataType.Name(tensor.data_type)
    if (
        tensor.raw_data
        and name not in ("INT4", "UINT4", "INT2", "UINT2", "FLOAT4E2M1")
        and len(tensor.raw_data) != size
    ):
        found = f"{len(tensor.raw_data)} bytes for dimensions {list(tensor.dims)}"
        raise OnnxError(
            where, found=found, expected=f"{size} bytes", fix="the file is damaged: copy or export it again"
        )
    try:
        values = onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError, RuntimeError) as err:
        found = f"dimensions {list(tensor.dims)} and other values ({_first_lines(err)})"
        raise OnnxError(where, found=found, expected=f"{count} values") from err
    if dtype.kind == "f" and bool((values != values).any()):  # noqa: PLR0124 - true of NaN alone
        raise OnnxError(where, found="NaN", expected="numbers", fix="the network is broken: export a good checkpoint")


def _inlined(model: ModelProto, opset: int, where: str, notes: list[str]) -> ModelProto:
    """The model without functions of its own."""
    if not model.functions:
        return model
    calls = {(f.domain, f.name): {(n.domain, n.op_type) for n in _all_nodes(f.node)} for f in model.functions}
    try:
        graphlib.TopologicalSorter({name: {c for c in used if c in calls} for name, used in calls.items()}).prepare()
        notes.append(f"{len(model.functions)} functions were written out")
        whole: ModelProto = inline_local_functions(model)
        return whole
    except graphlib.CycleError as err:
        names = " → ".join(name for _, name in err.args[1])
        raise OnnxError(where, found=f"functions that call each other in a circle: {names}", expected="none") from err
    except (ValueError, RuntimeError, onnx.checker.ValidationError) as err:
        raise OnnxError(where, found=_first_lines(err), expected=f"functions of opset {opset}") from err


def _tidy(model: ModelProto, notes: list[str]) -> None:
    """Drops what is no part of the computation, and may lie: shapes of values, notes, training, listed initialisers."""
    graph = model.graph
    kept = real_inputs(graph)
    if len(kept) < len(graph.input):
        notes.append(f"{len(graph.input) - len(kept)} initialisers that were listed as inputs are constants now")
        del graph.input[:]
        graph.input.extend(kept)
    model.ir_version = max(model.ir_version, 8)  # before 4, initialisers had to be inputs
    model.ir_version = min(model.ir_version, 10)  # what current runtimes read
    for field in ("training_info", "metadata_props", "functions", "doc_string"):
        model.ClearField(field)
    for part in _graphs(graph):
        for field in ("value_info", "doc_string", "quantization_annotation"):
            part.ClearField(field)
    for node in _all_nodes(graph.node):  # the exporter's stack traces name somebody's folders
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
        if node.domain == "ai.onnx":
            node.domain = ""
    main = [entry for entry in model.opset_import if entry.domain in _DOMAINS][:1]
    version = main[0].version
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", version))


def _check_values(graph: GraphProto, where: str) -> None:
    for value in (*graph.input, *graph.output):
        if value.type.WhichOneof("value") != "tensor_type":
            kind = value.type.WhichOneof("value") or "nothing"
            raise OnnxError(f"{where}: {value.name!r}", found=f"a value of type {kind}", expected="a tensor")
        _check_claim(value, where)


def _check_claim(value: onnx.ValueInfoProto, where: str) -> None:
    sizes = [size for size in dims_of(value) or () if isinstance(size, int)]
    if any(size < 0 for size in sizes):
        fix = "name free dimensions instead of writing -1"
        raise OnnxError(f"{where}: {value.name!r}", found=f"dimensions {sizes}", expected="0 or more", fix=fix)
    try:
        width = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize
    except KeyError:
        width = 1  # shape inference does not know it
    if math.prod(sizes) * width > MAX_BYTES:
        found = f"dimensions {sizes}, {math.prod(sizes) * width / 1e9:.1f} GB"
        raise OnnxError(f"{where}: {value.name!r}", found=found, expected="at most 2 GB")


def _check_nodes(graph: GraphProto, opset: int, where: str, outside: set[str]) -> None:
    """Every operator is one that ONNX knows, and reads what somebody produces."""
    known = outside | {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    made: set[str] = set()
    for node in graph.node:
        here = f"{where}: {node.op_type} {node.name!r}"
        if node.domain not in _DOMAINS:
            raise _strange_domain(node.domain, here)
        try:
            onnx.defs.get_schema(node.op_type, opset, "")
        except onnx.defs.SchemaError as err:
            fix = did_you_mean(node.op_type, {schema.name for schema in onnx.defs.get_all_schemas()})
            expected = f"an operator of ONNX's opset {opset}"
            raise OnnxError(here, found="an operator that ONNX does not have", expected=expected, fix=fix) from err
        for name in filter(None, node.output):
            if name in known or name in made:
                raise OnnxError(here, found=f"a second value named {name!r}", expected="different names")
            made.add(name)
    for node in graph.node:
        for name in filter(None, node.input):
            if name not in known and name not in made:
                here = f"{where}: {node.op_type} {node.name!r}"
                raise OnnxError(here, found=f"it reads {name!r}, which nothing produces", expected="a whole graph")
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                _check_nodes(inner, opset, where, known | made)
    for value in graph.output:
        if value.name not in known and value.name not in made:
            raise OnnxError(where, found=f"an output {value.name!r} that nothing produces", expected="a whole graph")


def _sort(graph: GraphProto, where: str, notes: list[str]) -> None:
    """Puts nodes behind those whose values they read."""
    maker = {name: place for place, node in enumerate(graph.node) for name in node.output if name}
    needs = {
        place: {maker[name] for name in node_reads(node) if name in maker} for place, node in enumerate(graph.node)
    }
    if all(place > max(earlier, default=-1) for place, earlier in needs.items()):
        return
    try:
        order = list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as err:
        names = [f"{graph.node[place].op_type} {graph.node[place].name!r}" for place in err.args[1]]
        shown = " → ".join(names[:6]) + (" → …" if len(names) > 6 else "")
        raise OnnxError(where, found=f"a circle of operators: {shown}", expected="a graph without one") from err
    nodes = [graph.node[place] for place in order]
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    notes.append("operators were sorted")


def node_reads(node: NodeProto) -> set[str]:
    """Names that a node reads, those of the graphs in its attributes included."""
    names = set(node.input)
    for attribute in node.attribute:
        for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
            names |= {name for part in inner.node for name in node_reads(part)} | {value.name for value in inner.output}
    return names


def _first_lines(err: BaseException) -> str:
    text = " ".join(line.strip() for line in str(err).splitlines() if line.strip())
    return text if len(text) <= 300 else f"{text[:300]}…"
