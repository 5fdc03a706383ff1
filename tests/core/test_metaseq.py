# SPDX-License-Identifier: Apache-2.0
"""metaseq's checkpoints: every layout gives back the tensors it was made of, or a clear error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import metaseq_files as files
import numpy as np
import pytest
from metaseq_files import Object, random_state, save
from numpy.typing import NDArray

from opt_core.checkpoints.sources import FileSource
from opt_core.checkpoints.tensors import LazyTensor, TensorInfo
from opt_core.checkpoints.torch_format import read_pickled
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError, ConfigError, FormatError
from opt_core.loading import match
from opt_core.metaseq import is_metaseq, open_metaseq
from opt_core.metaseq.config import infer_config, read_settings
from opt_core.metaseq.files import MAX_OPEN
from opt_core.params import param_table
from opt_core.presets import PRESETS

ROOT = Path(__file__).parents[2]
PRE_NORM = OPTConfig(
    vocab_size=24,
    hidden_size=8,
    num_hidden_layers=2,
    ffn_dim=16,
    max_position_embeddings=6,
    num_attention_heads=2,
)
MODELS = {
    "pre-norm": PRE_NORM,
    "post-norm, projected": PRE_NORM.replace(word_embed_proj_dim=4, do_layer_norm_before=False),
    "no biases": PRE_NORM.replace(enable_bias=False),
    "plain norms": PRE_NORM.replace(layer_norm_elementwise_affine=False),
}
State = dict[str, NDArray[Any]]
Write = Callable[[Path, State], object]
LAYOUTS: dict[str, Write] = {
    "restored.pt": lambda folder, state: files.write_single(folder, state),
    "bare state dict, unfused": lambda folder, state: files.write_single(
        folder, state, fused=False, bare=True
    ),
    "1 part": lambda folder, state: files.write_parts(folder, state, 1),
    "4 parts": lambda folder, state: files.write_parts(folder, state, 4),
    "2 parts, unfused": lambda folder, state: files.write_parts(folder, state, 2, fused=False),
    "OPT-IML": lambda folder, state: files.write_parts(
        folder, state, 2, stem="checkpoint_1_400.pt"
    ),
    "2 flat parts": lambda folder, state: files.write_flat_parts(folder, state, 2),
    "1 shard": lambda folder, state: files.write_shards(folder, state, 1),
    "3 shards": lambda folder, state: files.write_shards(folder, state, 3, fused=False),
    "more shards than layer norms have elements": lambda folder, state: files.write_shards(
        folder, state, 90
    ),
    "2 parts x 5 shards": lambda folder, state: files.write_shards(folder, state, 5, parts=2),
    "4 parts x 12 shards": lambda folder, state: files.write_shards(folder, state, 12, parts=4),
}


def check(folder: Path, config: OPTConfig, state: State) -> None:
    """The checkpoint holds exactly the state, bit by bit, whichever way it is read."""
    with open_metaseq(folder) as reader:
        sources, report = match(config, "OPTForCausalLM", reader)
        assert not report.missing and not report.unexpected and not report.mismatched, report
        assert sources.keys() == state.keys()
        for name, source in sources.items():
            tensor, array = source.tensor, state[name]
            assert tensor.dtype == array.dtype and tensor.shape == array.shape
            assert tensor.read().tobytes() == tensor.map().tobytes() == array.tobytes(), name
            assert b"".join(block.tobytes() for block in tensor.blocks(32)) == array.tobytes()
            half = array.shape[-1] // 2
            assert (
                tensor.read_slice(array.ndim - 1, half, array.shape[-1]).tobytes()
                == array[..., half:].tobytes()
            )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_back_the_tensors(tmp_path: Path, layout: str, model: str) -> None:
    state = random_state(MODELS[model])
    LAYOUTS[layout](tmp_path, state)
    assert is_metaseq(tmp_path)
    check(tmp_path, MODELS[model], state)


def test_bfloat16_and_names_with_model_in_front(tmp_path: Path) -> None:
    import ml_dtypes

    state = random_state(PRE_NORM, ml_dtypes.bfloat16)
    model = {f"model.{name}": a for name, a in files.metaseq_state(state).items()}
    for number, part in enumerate(files.split_parts(model, 2)):
        save(tmp_path / f"x-model_part-{number}.pt", {"model": part, "args": None})
    check(tmp_path, PRE_NORM, state)


@pytest.mark.parametrize("model", ["pre-norm", "no biases"])
def test_the_flat_files_of_2022_lack_their_metadata(tmp_path: Path, model: str) -> None:
    """Their sizes must be those of config.json, or of a published model; nothing is guessed."""
    state = random_state(MODELS[model])
    files.write_flat_parts(tmp_path, state, 2, metadata=False)
    with pytest.raises(FormatError, match=r"shard_metadata.*a published size.*Put the config.json"):
        open_metaseq(tmp_path)
    MODELS[model].replace(ffn_dim=18).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"3 flat parameters.*config.json beside it in 2 parts"):
        open_metaseq(tmp_path)
    MODELS[model].save_pretrained(tmp_path)
    check(tmp_path, MODELS[model], state)


def test_shared_parameters_are_the_same_tensor(tmp_path: Path) -> None:
    """fairscale keeps the tied output projection as a name only."""
    from opt_core.metaseq.flat import parse_metadata, unflatten, unpad

    part = files.metaseq_state(random_state(PRE_NORM))
    shards = files.shard(part, 3)
    ranks = []
    for model, metadata in zip(shards.models, shards.metadata, strict=True):
        structure, padding = parse_metadata(metadata, "f")
        lazy = {name: LazyTensor.from_array(name, array) for name, array in model.items()}
        ranks.append(unpad(structure, padding, lazy, "f"))
    found = {tensor.name: tensor.read() for tensor in unflatten(structure, ranks, "f")}
    assert found.keys() == {*part, files.SHARED[1]}
    assert np.array_equal(found[files.SHARED[1]], part[files.SHARED[0]])
    assert all(np.array_equal(found[name], part[name]) for name in part)


# --- files --------------------------------------------------------------------------------------


def test_several_checkpoints_in_one_directory(tmp_path: Path) -> None:
    one, two = random_state(PRE_NORM, seed=1), random_state(PRE_NORM, seed=2)
    files.write_shards(tmp_path, one, 2, parts=2)
    files.write_parts(tmp_path, two, 2)
    (tmp_path / "optimizer.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found 2, such as checkpoint_last-.*reshard-"):
        open_metaseq(tmp_path)
    with open_metaseq(tmp_path / "reshard-model_part-1.pt") as reader:
        assert len(reader.files) == 2
        assert np.array_equal(
            reader["decoder.embed_tokens.weight"].read(), two["model.decoder.embed_tokens.weight"]
        )
    with open_metaseq(tmp_path / "checkpoint_last-model_part-1-shard0.pt") as reader:
        assert len(reader.files) == 4


@pytest.mark.parametrize(
    "missing", ["model_part-0-shard1", "model_part-1-shard0", "model_part-1-shard2"]
)
def test_a_missing_shard_is_named(tmp_path: Path, missing: str) -> None:
    files.write_shards(tmp_path, random_state(PRE_NORM), 3, parts=2)
    (tmp_path / f"checkpoint_last-{missing}.pt").unlink()
    with pytest.raises(FormatError, match=rf"expected checkpoint_last-{missing}.pt, found none"):
        open_metaseq(tmp_path)


def test_the_last_shard_of_every_part_is_missing(tmp_path: Path) -> None:
    """No file's name tells; the lengths do."""
    files.write_shards(tmp_path, random_state(PRE_NORM), 3, parts=2)
    for part in range(2):
        (tmp_path / f"checkpoint_last-model_part-{part}-shard2.pt").unlink()
    with pytest.raises(FormatError, match=r"'flat_param_0': expected parts that make up float16"):
        open_metaseq(tmp_path)


def test_what_is_no_metaseq_checkpoint(tmp_path: Path) -> None:
    assert not is_metaseq(tmp_path) and not is_metaseq(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"expected \*\.pt files"):
        open_metaseq(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"PK\3\4")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\3\4")
    assert not is_metaseq(tmp_path) and not is_metaseq(tmp_path / "pytorch_model.bin")
    (tmp_path / "x-shard99999999999999.pt").write_bytes(b"text")
    assert not is_metaseq(tmp_path)
    with pytest.raises(FormatError, match=r"expected x-shard0.pt, found none"):
        open_metaseq(tmp_path)


EIGHT_PARTS = PRE_NORM.replace(hidden_size=16, ffn_dim=32, num_attention_heads=8)
MANY = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
from test_metaseq import EIGHT_PARTS, check
from metaseq_files import random_state
check(Path(sys.argv[1]), EIGHT_PARTS, random_state(EIGHT_PARTS))
from opt_core.metaseq import open_metaseq
from opt_core.metaseq.files import MAX_OPEN
with open_metaseq(sys.argv[1]) as reader:
    assert (len(reader.files), reader.files_open) == (992, MAX_OPEN)
    sum(tensor.read().size for tensor in reader.values())
    print(len(list(Path("/proc/self/fd").iterdir())))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_992_files_of_which_few_are_open(tmp_path: Path) -> None:
    """The layout of 175B: 8 parts of 124 shards each."""
    files.write_shards(tmp_path, random_state(EIGHT_PARTS), 124, parts=8)
    done = subprocess.run(
        [sys.executable, "-c", MANY, str(tmp_path)],
        capture_output=True, text=True, check=False,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'core'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= MAX_OPEN + 16


def test_unflattened_with_the_metadata_of_the_file_it_was_made_from(tmp_path: Path) -> None:
    """As convert_to_singleton.py leaves it: it replaces the model, and nothing around it."""
    state = random_state(PRE_NORM)
    model = files.metaseq_state(state)
    metadata = files.shard(model, 1).metadata[0]
    save(tmp_path / "restored.pt", {**files.run(model), "shard_metadata": metadata})
    check(tmp_path, PRE_NORM, state)


@pytest.mark.parametrize("count", [8, 2**80, "8", True, None, []])
def test_files_of_two_moments_of_the_training_run(tmp_path: Path, count: Any) -> None:
    """Only numbers can tell: a run that does not count is not refused."""
    state = random_state(PRE_NORM)
    parts = files.split_parts(files.metaseq_state(state), 2)
    for number, part in enumerate(parts):
        content = files.run(part)
        if number:
            content["optimizer_history"][-1]["num_updates"] = count
        save(tmp_path / f"x-model_part-{number}.pt", content)
    if type(count) is int:
        with pytest.raises(FormatError, match=r"x-model_part-1.pt: .*after 7 updates.*after \d+"):
            open_metaseq(tmp_path)
    else:
        check(tmp_path, PRE_NORM, state)


# --- files that lie -----------------------------------------------------------------------------

Content = dict[str, Any]


def flat(content: Content, module: int = 0) -> dict[str, Any]:
    """What the metadata of one file says of a module's flat parameter."""
    params: dict[str, Any] = content["shard_metadata"]["param_metadata"][module]["params"]
    entry: dict[str, Any] = params["flat_param_0"]
    return entry


def set_numel(content: Content) -> None:
    flat(content)["numels"][0] += 1


def set_shape(content: Content) -> None:
    flat(content)["shapes"] = [(12, 7), *flat(content)["shapes"][1:]]


def set_longer(content: Content) -> None:
    entry = flat(content)
    entry["shapes"] = [(2**40, 2**40), *entry["shapes"][1:]]
    entry["numels"][0] = 2**80


def set_padding(content: Content) -> None:
    flat(content)["padding"] = 10**6


def set_small_padding(content: Content) -> None:
    flat(content)["padding"] += 1


def set_name(content: Content) -> None:
    flat(content, 1)["names"][0] = flat(content, 1)["names"][1]


def drop_flat(content: Content) -> None:
    del content["model"]["flat_param_0"]


def drop_metadata(content: Content) -> None:
    del content["shard_metadata"]


def set_path(content: Content) -> None:
    content["shard_metadata"]["param_metadata"][1]["fsdp_path"] = 7


def set_shared(content: Content) -> None:
    content["shard_metadata"]["param_metadata"][0]["shared_param_info"] = [("a", "b")]


def set_dtype(content: Content) -> None:
    content["model"]["flat_param_0"] = content["model"]["flat_param_0"].astype(np.float32)


def set_matrix(content: Content) -> None:
    content["model"]["flat_param_0"] = content["model"]["flat_param_0"].reshape(1, -1)


def list_bomb(content: Content) -> None:
    """A thousand modules that share one list of a thousand names: a million tensors."""
    names = Object("builtins.list", ([f"{n}" for n in range(1000)],), called=True)
    module = content["shard_metadata"]["param_metadata"][1]
    content["shard_metadata"]["param_metadata"] += [module] * 1000
    flat(content, 1)["names"] = names


LIES: dict[str, tuple[Callable[[Content], None], str]] = {
    "numels": (set_numel, "a shape that does not have its number of elements"),
    "shape": (set_shape, "a shape that does not have its number of elements"),
    "huge": (set_longer, "expected the same parameters|expected a shape"),
    "padding": (set_padding, "with 1000000 elements of padding"),
    "small padding": (set_small_padding, "'flat_param_0': expected parts that make up"),
    "name": (set_name, "two parameters 'decoder.layers.0.self_attn.qkv_proj.bias'"),
    "no flat": (drop_flat, "'flat_param_0': expected a flat parameter.*found none"),
    "no metadata": (drop_metadata, "expected shard_metadata"),
    "path": (set_path, "a name that is no text"),
    "shared": (set_shared, "the same parameters|a parameter 'a' that 'b' shares"),
    "dtype": (set_dtype, "'flat_param_0': expected parts that make up"),
    "matrix": (set_matrix, r"'flat_param_0': expected a flat parameter.*found shape \(1, "),
    "list bomb": (list_bomb, "a list that is none"),
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("lie", "message"), LIES.values(), ids=LIES)
def test_metadata_that_lies(
    tmp_path: Path, lie: Callable[[Content], None], message: str, rank: int
) -> None:
    shards = files.shard(files.metaseq_state(random_state(PRE_NORM)), 2)
    for number in range(2):
        content = {"model": shards.models[number], "shard_metadata": shards.metadata[number]}
        if number == rank:
            lie(content)
        save(tmp_path / f"c-shard{number}.pt", content)
    with pytest.raises(FormatError, match=f"(?s){message}"):
        open_metaseq(tmp_path)


def test_modules_without_end(tmp_path: Path) -> None:
    """Two bytes name a module again; its pieces would be kept for each of a thousand files."""
    shards = files.shard(files.metaseq_state(random_state(PRE_NORM)), 2)
    shards.metadata[0]["param_metadata"] *= 2
    save(
        tmp_path / "x-shard0.pt", {"model": shards.models[0], "shard_metadata": shards.metadata[0]}
    )
    (tmp_path / "x-shard1.pt").write_bytes(b"never opened")
    with pytest.raises(FormatError, match="x-shard0.pt: .*found two parameters 'flat_param_0'"):
        open_metaseq(tmp_path)


def test_names_without_end(tmp_path: Path) -> None:
    """A list of names stands in the pickle once and in the structure a million times."""
    emitter = files.Emitter()
    entry = {"names": [f"n{i}" for i in range(900)], "shapes": [()] * 900, "numels": [1] * 900}
    one = emitter.emit({**entry, "padding": 0})
    params = b"}(" + emitter.emit("first") + one + b"q\x00"
    params += b"".join(emitter.emit(f"p{i}") + b"h\x00" for i in range(5000)) + b"u"
    modules = b"](" + b"}(" + emitter.emit("fsdp_path") + emitter.emit("a")
    modules += emitter.emit("params") + params + b"ue"
    program = b"\x80\x02}(" + emitter.emit("model")
    program += emitter.emit({"w": np.zeros(2, np.float32)}) + emitter.emit("shard_metadata")
    program += b"}(" + emitter.emit("param_metadata") + modules + b"uu."
    files.save_program(tmp_path / "x.pt", program, emitter.storages)
    with pytest.raises(FormatError, match="more than 100000 tensors"):
        open_metaseq(tmp_path)


def parts_with(tmp_path: Path, change: Callable[[State], None], number: int = 1) -> None:
    for i, part in enumerate(files.split_parts(files.metaseq_state(random_state(PRE_NORM)), 2)):
        if i == number:
            change(part)
        save(tmp_path / f"reshard-model_part-{i}.pt", {"model": part})


QKV = "decoder.layers.0.self_attn.qkv_proj.weight"
MISFITS: dict[str, tuple[Callable[[State], None], str]] = {
    "qkv": (lambda part: part.update({QKV: part[QKV][:-1]}), "rows of three projections"),
    "scalar qkv": (
        lambda part: part.update({QKV: np.zeros((), np.float16)}), "rows of three projections",
    ),
    "norm": (
        lambda part: part.update({"decoder.layer_norm.bias": np.zeros(7, np.float16)}),
        r"'decoder.layer_norm.bias': expected float16 \(8,\) as in reshard-model_part-0.pt",
    ),
    "dtype": (
        lambda part: part.update(
            {"decoder.layers.1.fc1.bias": part["decoder.layers.1.fc1.bias"].astype(np.float32)}
        ),
        r"'decoder.layers.1.fc1.bias': expected parts that make up float16 \(16,\)",
    ),
    "width": (
        lambda part: part.update({"decoder.layers.1.fc2.weight": np.zeros((7, 8), np.float16)}),
        r"'decoder.layers.1.fc2.weight': expected parts that make up float16 \(8, 16\)",
    ),
    "vector": (
        lambda part: part.update({"decoder.layers.1.fc2.weight": np.zeros(7, np.float16)}),
        "'decoder.layers.1.fc2.weight': expected",
    ),
    "fewer": (
        lambda part: part.__delitem__("decoder.layer_norm.bias"),
        "found 'decoder.layer_norm.bias' in only one of the parts 0 and 1",
    ),
    "twice": (
        lambda part: part.update({QKV.replace("qkv", "k"): np.zeros((4, 8), np.float16)}),
        "in only one of the parts 0 and 1",
    ),
    "empty": (lambda part: part.clear(), "found no tensors there"),
}  # fmt: skip


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_parts_that_do_not_fit(
    tmp_path: Path, change: Callable[[State], None], message: str, number: int
) -> None:
    parts_with(tmp_path, change, number)
    if number == 1:
        with pytest.raises(FormatError, match=message):
            open_metaseq(tmp_path)
    else:
        with pytest.raises(FormatError):
            open_metaseq(tmp_path)


def test_fused_and_apart_at_once(tmp_path: Path) -> None:
    model = files.metaseq_state(random_state(PRE_NORM))
    model[QKV.replace("qkv", "k")] = np.zeros((8, 8), np.float16)
    save(tmp_path / "restored.pt", {"model": model})
    with pytest.raises(FormatError, match=r"k_proj.weight"):
        open_metaseq(tmp_path)


def test_attacks_are_refused_here_too(tmp_path: Path) -> None:
    for name in ("os.system", "posix.system", "builtins.eval", "builtins.getattr", "torch.load",
                 "__builtin__.exec", "subprocess.Popen", "metaseqx.a", "omegaconf"):  # fmt: skip
        model = {"w": np.zeros(2, np.float32)}
        for attack in (Object(name, ("1",), called=True), Object(name, None), Object(name, ())):
            save(tmp_path / "x.pt", {"model": model, "cfg": attack})
            with pytest.raises(FormatError, match="not executed|broken pickle"):
                open_metaseq(tmp_path)


def test_objects_are_remembered_and_never_made(tmp_path: Path) -> None:
    """Even a class that exists and is named by the file stays a name."""
    inside = Object("metaseq.os.system", ("exit 1",), called=True)
    save(tmp_path / "x.pt", {"w": np.zeros(2, np.float32), 5: inside, None: 1, 2.5: [inside]})
    value, place = read_pickled(FileSource(tmp_path / "x.pt"))
    assert list(value) == ["w", "5", "None", "2.5"]
    assert repr(value["5"]) == "Inert('metaseq.os.system')"
    assert value["5"].arguments == ("exit 1",)
    assert place("w", value["w"]).shape == (2,)


def test_lists_that_double(tmp_path: Path) -> None:
    """2**40 elements by reference are forty lists: building and forgetting them is all that is done."""
    emitter = files.Emitter()
    model = emitter.emit("model") + emitter.emit({"w": np.zeros(2, np.float32)})
    doubling = b"](]K\x01a" + b"q\x00](h\x00h\x00e" * 40 + b"e"
    for key in ("cfg", "args", "shard_metadata", "extra_state"):
        program = b"\x80\x02}(" + model + emitter.emit(key) + doubling + b"u."
        files.save_program(tmp_path / "x.pt", program, emitter.storages)
        if key == "shard_metadata":
            with pytest.raises(FormatError, match="no 'param_metadata'"):
                open_metaseq(tmp_path)
        else:
            with open_metaseq(tmp_path) as reader:
                assert list(reader) == ["w"]
    nested = b")" + b"\x85" * 200_000
    files.save_program(
        tmp_path / "x.pt",
        b"\x80\x02}(" + model + emitter.emit("cfg") + nested + b"u.",
        emitter.storages,
    )
    open_metaseq(tmp_path).close()


# --- configurations -----------------------------------------------------------------------------


class _Nowhere:
    """A source as large as any tensor, of which nothing can be read."""

    path = Path("f")
    size = 2**62

    def memory(self) -> Any:
        raise NotImplementedError

    def read_into(self, out: NDArray[np.uint8], offset: int) -> None:
        raise NotImplementedError


def described(config: OPTConfig) -> dict[str, LazyTensor]:
    """The tensors of a model under metaseq's names, without values."""
    tensors = {}
    for param in param_table(config):
        name = param.name.removeprefix("model.").replace(
            "decoder.final_layer_norm", "decoder.layer_norm"
        )
        name = name.replace(".project_in.", ".project_in_dim.")
        name = name.replace(".project_out.", ".project_out_dim.")
        info = TensorInfo(name, np.dtype(np.float16), param.shape, Path("f"))
        tensors[name] = LazyTensor(info, _Nowhere())
    return tensors


@pytest.mark.parametrize("name", PRESETS)
def test_the_configuration_of_a_published_size(name: str) -> None:
    preset = OPTConfig.preset(name, torch_dtype="float16")
    assert infer_config(described(preset), {}) == preset
    settings = {
        "num_attention_heads": preset.num_attention_heads * 2,
        "activation_function": "gelu",
    }
    assert infer_config(described(preset), settings) == preset.replace(**settings)


@pytest.mark.parametrize("model", MODELS)
def test_the_configuration_of_another_size(model: str) -> None:
    config = MODELS[model].replace(torch_dtype="float16")
    settings = {"num_attention_heads": 2, "do_layer_norm_before": config.do_layer_norm_before}
    assert infer_config(described(config), settings) == config
    with pytest.raises(ConfigError, match=r"num_attention_heads \(decoder_attention_heads in its"):
        infer_config(described(config), {})
    if "decoder.layer_norm.weight" in described(config):
        assert infer_config(described(config), {"num_attention_heads": 2}) == config
    else:
        with pytest.raises(ConfigError, match=r"do_layer_norm_before \(decoder_normalize_before"):
            infer_config(described(config), {"num_attention_heads": 2})


def test_a_pre_norm_model_without_final_norm() -> None:
    config = PRE_NORM.replace(_remove_final_layer_norm=True, torch_dtype="float16")
    settings = {"num_attention_heads": 2, "do_layer_norm_before": True}
    assert infer_config(described(config), settings) == config


def test_no_model_of_opt(tmp_path: Path) -> None:
    save(tmp_path / "x.pt", {"model": {"weight": np.zeros(2, np.float32)}})
    with (
        open_metaseq(tmp_path) as reader,
        pytest.raises(CheckpointError, match="tells its vocab_size"),
    ):
        _ = reader.config


RUN = {
    "decoder_attention_heads": 4,
    "activation_fn": "gelu",
    "decoder_normalize_before": True,
    "decoder_ffn_embed_dim": [1],
}
WANTED = {"num_attention_heads": 4, "activation_function": "gelu", "do_layer_norm_before": True}


@pytest.mark.parametrize(
    "content",
    [
        {"cfg": {"model": files.namespace(**RUN)}, "args": None},
        {"cfg": {"model": RUN}},
        {"cfg": None, "args": files.namespace(**RUN)},
        {"cfg": {"model": files.omegaconf({**RUN, "decoder_ffn_embed_dim": 1})}},
        {"cfg": files.omegaconf({"model": {**RUN, "decoder_ffn_embed_dim": 1}, "task": {}})},
    ],
    ids=["namespace", "dict", "args", "omegaconf", "omegaconf throughout"],
)
def test_settings_of_the_training_run(tmp_path: Path, content: dict[str, Any]) -> None:
    state = files.metaseq_state(random_state(PRE_NORM))
    save(tmp_path / "restored.pt", {"model": state, **content})
    with open_metaseq(tmp_path) as reader:
        assert reader.settings == WANTED
        assert reader.config == PRE_NORM.replace(
            num_attention_heads=4, activation_function="gelu", torch_dtype="float16"
        )
    PRE_NORM.save_pretrained(tmp_path)
    with open_metaseq(tmp_path) as reader:
        assert reader.config == PRE_NORM, "a config.json wins"


@pytest.mark.parametrize("value", [None, [], {"cfg": [1]}, {"cfg": {"model": 3}, "args": "x"}])
def test_settings_that_are_none(value: Any) -> None:
    assert read_settings(value) == {}


# --- damage -------------------------------------------------------------------------------------


def test_truncations_and_flipped_bytes_are_read_or_refused(tmp_path: Path) -> None:
    files.write_shards(tmp_path, random_state(PRE_NORM), 2)
    path = tmp_path / "checkpoint_last-shard1.pt"
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for attempt in range(300):
        broken = bytearray(data)
        if attempt % 3:
            for position in rng.integers(0, len(data), rng.integers(1, 4)):
                broken[position] = rng.integers(256)
        else:
            del broken[int(rng.integers(len(data))) :]
        path.write_bytes(broken)
        try:
            with open_metaseq(tmp_path) as reader:
                assert all(tensor.read().nbytes < len(data) * 2 for tensor in reader.values())
        except (CheckpointError, ConfigError):
            continue
