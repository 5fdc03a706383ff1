# SPDX-License-Identifier: Apache-2.0
"""The three backends can be read side by side: same files, definitions, order and arguments.

What differs stands in the tables below, with its reason. An entry that no longer applies fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

import pytest

from tests.architecture.definitions import (
    BACKENDS,
    ROOT,
    definitions,
    exports,
    sources,
    without_prefix,
)

BUILD = "Keras makes variables in build, not in the constructor"
GRAPH = "what a graph cannot tell while it is traced"
WEIGHTS = "Keras' fit takes weights of rows and labels"
LINEN = "a Linen module holds no parameters; the class around it does"
OFFLOAD = "accelerate places torch modules alone"
MAPPING = "TensorFlow and JAX have weights in memory of their own"
STATE = "parameters live in the modules of torch alone"
TWO_DTYPES = "parameters in Flax have a dtype beside the computation's"
CUDA = "torch runs its kernels one by one, and its host asks an accelerator only where it must"
APART = "what runs on the host is one program, where JAX would compile each operation by itself"
FLASH = "FlashAttention-2 is told where the real tokens are, which a compiled program cannot see"

#: (backend, file, names) -> why only one of torch and that backend has them; patterns are allowed.
NAMES: dict[tuple[str, str, str], str] = {
    ("tf", "*", "*.build"): BUILD,
    ("tf", "cache.py", "KVCache.__tf_*flatten__"): "a cache passes through a compiled function",
    ("tf", "attention.py", "_swap_axes"): "torch and numpy have it as a method",
    (
        "tf",
        "generation/decode.py",
        "_compiled_while",
    ): "TensorFlow's loops have no fields that are None",
    (
        "flax",
        "generation/decode.py",
        "prompt_positions with_room prompt_columns step_inputs",
    ): APART,
    ("flax", "generation/search.py", "chosen"): APART,
    ("tf", "generation/generate.py", "_SMALLEST _gumbel"): "its own draws differ when compiled",
    (
        "tf",
        "generation/*.py",
        "_MINUS_INF",
    ): "named operations that torch has built in",
    ("flax", "generation/processors.py", "is_any_of"): "jnp.isin takes the ids as they are",
    ("*", "generation/decode.py", "step_forward"): CUDA,
    ("*", "generation/search.py", "PATIENCE columns_until_end"): CUDA,
    ("*", "generation/state.py", "AT_HAND sent"): CUDA,
    ("*", "masks.py", "without_effect"): FLASH,
    (
        "flax",
        "attention.py",
        "CUDNN_BACKENDS CUDNN_DTYPES cudnn_attention _fused_attention",
    ): "cuDNN's kernel is JAX's; torch's stand in flash.py",
    ("*", "generation/decode.py", "forward"): "the part of a step that is compiled alone",
    ("*", "generation/generate.py", "compiled_run"): "the loop is compiled as a whole",
    ("*", "generation/generate.py", "_randomness"): "a graph takes its randomness as an argument",
    ("*", "generation/assisted.py", "_filled"): "few numbers of proposals are compiled",
    ("flax", "generation/generate.py", "_array"): "numpy reads arrays of JAX as they are",
    ("tf", "heads.py", "*.compute_logits"): "a tied head has no layer of its own",
    (
        "tf",
        "model.py *heads.py",
        "*.loss_of *.predictions_of *.labels_in",
    ): "Keras' fit asks the model for its loss",
    ("tf", "losses.py", "label_weights"): WEIGHTS,
    ("tf", "decoder.py", "OPTDecoder._check"): "checked in inputs.py, before Keras converts them",
    ("tf", "decoder.py", "*.save_own_variables *.load_own_variables"): "Keras saves no seeds",
    (
        "tf",
        "decoder.py",
        "OPTDecoder._next_seed",
    ): "dropout is stateless: right under recomputation",
    ("tf", "decoder.py", "OPTDecoder._keeps_layer"): GRAPH,
    ("tf", "decoder.py", "OPTDecoder._fit"): GRAPH,
    ("*", "heads.py", "*.prepare_inputs_for_generation"): "PEFT adapts torch modules alone",
    ("*", "pretrained.py", "OPTPreTrainedModel._apply"): STATE,
    ("tf", "pretrained.py", "OPTPreTrainedModel.forward"): "TensorFlow's three ways to pass inputs",
    ("tf", "pretrained.py", "OPTPreTrainedModel.dummy_inputs"): "what a Keras model is exported on",
    ("tf", "pretrained.py", "*._replace"): "a built Keras model is unlocked to change its parts",
    ("tf", "pretrained.py", "*.dtype *.device"): "dtype is Keras' own; it places by itself",
    ("tf", "weights.py", "to_tensor from_numpy"): STATE,
    ("tf", "weights.py", "_merged"): "Keras holds LoRA's factors beside the weights",
    ("*", "weights.py", "assign_one"): OFFLOAD,
    (
        "*",
        "weights.py",
        "added_tensors _table_tensors added_outgoing assign_added follow _stored_dtype",
    ): "only torch saves layers of the user's",
    ("tf", "weights.py", "_refuse_added"): "and Keras' own files hold them",
    ("*", "weights.py", "share_memory"): STATE,
    (
        "*",
        "pretrained.py",
        "OPTPreTrainedModel._is_tied",
    ): "Keras and Flax have no head that is tied",
    ("*", "activations.py", "gelu"): "the framework's own default is the approximation",
    ("flax", "attention.py", "Dropout"): "a kernel is given its random numbers as a function",
    ("flax", "*heads.py", "OPTFor*.__init__ OPTFor*Module*"): LINEN,
    ("flax", "layers.py", "OPTLearnedPositionalEmbedding.__init__"): LINEN,
    (
        "flax",
        "decoder.py",
        "OPTDecoderLayers*",
    ): "gives the layers the names 0, 1, ... of the files",
    ("flax", "model.py", "OPTModel.__init__ OPTModule*"): LINEN,
    (
        "flax",
        "pretrained.py",
        "*.post_init *.tie_weights *._actual_config *.get_*put_embeddings *.dtype *.device "
        "*.init_weights *.params *._given *._call _available *._decoder *._set_rows "
        "*.enable_gradient_checkpointing HEAD",
    ): LINEN,
    ("flax", "pretrained.py", "*.to_bf16 *.to_fp16 *.to_fp32 _*_16_bits _held_dtype"): TWO_DTYPES,
    ("flax", "weights.py", "cast"): TWO_DTYPES,
    (
        "flax",
        "weights.py",
        "find_parameter to_tensor from_numpy to_numpy Params initializer flax_shape to_array "
        "check_params to_canonical find_rows with_rows check_rows",
    ): STATE,
}
#: Argument -> why only one of torch and that backend has it, wherever it stands.
ARGUMENTS: dict[str, dict[str, str]] = {
    "tf": {
        "kwargs": "Keras' own arguments: name, dtype, trainable",
        "name": "a Keras layer must be told its name",
        "dtype": "a Keras layer must be told its dtype; torch converts a model later",
        "seed": "dropout is stateless",
        "sample_weight": WEIGHTS,
        "weights": WEIGHTS,
        "saved_model": "TensorFlow has a format of programs",
        "version": "of a SavedModel",
        "signatures": "of a SavedModel",
        "attn_implementation": "handed on among Keras' own arguments",
        "training": "Keras' word for a mode that torch keeps in the module",
        "device": "TensorFlow places tensors by itself",
        "waits": "TensorFlow has a length at hand, or does not know it",
        "device_map": OFFLOAD,
        "max_memory": OFFLOAD,
        "offload_folder": OFFLOAD,
        "mmap": MAPPING,
        "mapped": MAPPING,
        "gradient_checkpointing_kwargs": "options of torch.utils.checkpoint",
    },
    "flax": {
        "config": LINEN,
        "attn_implementation": LINEN,
        "dtype": "a Linen module computes in a dtype of its own",
        "param_dtype": "and stores in another",
        "deterministic": "Linen's word for a mode that torch keeps in the module",
        "device": "jax places arrays by itself",
        "device_map": OFFLOAD,
        "max_memory": OFFLOAD,
        "offload_folder": OFFLOAD,
        "mmap": MAPPING,
        "mapped": MAPPING,
        "gradient_checkpointing_kwargs": "options of torch.utils.checkpoint",
        "model": LINEN,
        "module": LINEN,
        "params": LINEN,
        "rng": "initial values are drawn from a key",
        "key": "a compiled loop draws from a key",
        "prng_key": "the reference's name for a key given by the caller",
        "seed": "part of the key",
        "input_shape": "an argument of the reference's Flax classes",
        "_do_init": "an argument of the reference's Flax classes",
    },
}
#: (backend, file, name) -> why the arguments are others altogether.
SIGNATURES: dict[tuple[str, str, str], str] = {
    ("*", "heads.py", "OPTForCausalLM.forward"): "the reference's order in that framework",
    ("flax", "model.py", "OPTModel.forward"): "the reference's order in that framework",
    ("flax", "task_heads.py", "*.forward"): "the order of the reference's other classes in Flax",
    ("*", "generation/decode.py", "decode_step"): CUDA,
    ("*", "generation/generate.py", "_noise"): "a graph takes its randomness as an argument",
    ("tf", "weights.py", "to_numpy resized"): "a Keras kernel is stored transposed",
    ("flax", "weights.py", "resized"): STATE,
}

#: What each framework has but not quite as OPT needs it: little that two of them share.
PARTS = {"parts.py", "decoding_weights.py"}
TORCH = [
    file
    for path in sources("opt_torch")
    if (file := path.relative_to(ROOT / "opt_torch").as_posix()) not in PARTS
]
TWINS = [(backend, file) for backend in ("tf", "flax") for file in TORCH]
#: Files of torch's own: the vendor's kernels, CUDA graphs, weights that stay in files, and accelerate.
TORCH_ONLY = {"flash.py", "generation/graphs.py", "mapping.py", "offload.py"}
#: What XLA compiles, and each framework keeps in its own way.
COMPILED = "generation/programs.py"
#: Files of one backend for what the other frameworks have built in.
OWN_FILES: dict[str, set[str]] = {
    "tf": {"_keras.py", "adapters.py", "export.py", "inputs.py", "training.py", COMPILED, *PARTS},
    "flax": {COMPILED, *PARTS},
}


def pair(backend: str, file: str) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    twin = ROOT / BACKENDS[backend] / file
    assert twin.exists(), f"{BACKENDS[backend]}/{file} is missing"
    return definitions(ROOT / "opt_torch" / file), definitions(twin)


def rules(table: dict[tuple[str, str, str], str], *found: str) -> list[tuple[str, str, str]]:
    """The entries that speak of a backend, a file and a name."""
    return [
        rule
        for rule in table
        if all(matches(value, patterns) for value, patterns in zip(found, rule, strict=True))
    ]


def matches(value: str, patterns: str) -> bool:
    return any(fnmatchcase(value, pattern) for pattern in patterns.split())


def stripped(backend: str, arguments: tuple[str, ...]) -> list[str]:
    return [name for name in arguments if name not in ARGUMENTS[backend]]


@pytest.mark.parametrize("backend", ["tf", "flax"])
def test_the_same_files(backend: str) -> None:
    package = ROOT / BACKENDS[backend]
    found = {path.relative_to(package).as_posix() for path in sources(BACKENDS[backend])}
    assert found - OWN_FILES[backend] == set(TORCH) - TORCH_ONLY


@pytest.mark.parametrize(("backend", "file"), TWINS)
def test_the_same_definitions_in_the_same_order(backend: str, file: str) -> None:
    if file in TORCH_ONLY:
        return
    torch, twin = pair(backend, file)
    alone = [name for name in {**torch, **twin} if (name in torch) != (name in twin)]
    assert [name for name in alone if not rules(NAMES, backend, file, name)] == []
    common = [name for name in torch if name in twin]
    assert common == [name for name in twin if name in torch], "order of definitions"


@pytest.mark.parametrize(("backend", "file"), TWINS)
def test_the_same_arguments(backend: str, file: str) -> None:
    if file in TORCH_ONLY:
        return
    torch, twin = pair(backend, file)
    for name in torch.keys() & twin.keys():
        if not rules(SIGNATURES, backend, file, name):
            ours, theirs = stripped(backend, twin[name]), stripped(backend, torch[name])
            assert ours == theirs, f"{name}: torch {torch[name]}, {backend} {twin[name]}"


@pytest.mark.parametrize("backend", ["tf", "flax"])
def test_the_same_public_names(backend: str) -> None:
    ours = {without_prefix(name) for name in exports(BACKENDS[backend])}
    assert ours == set(exports("opt_torch"))


def needed() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every allowance that is made use of."""
    for backend, file in TWINS:
        if file in TORCH_ONLY:
            continue
        torch, twin = pair(backend, file)
        for name in {**torch, **twin}:
            if (name in torch) != (name in twin):
                yield from (("name", rule) for rule in rules(NAMES, backend, file, name)[:1])
            elif torch[name] != twin[name]:
                yield from (("call", rule) for rule in rules(SIGNATURES, backend, file, name))
                for argument in set(torch[name]) ^ set(twin[name]):
                    yield "argument", (backend, argument)


def test_no_allowance_is_idle() -> None:
    used = set(needed())
    idle = [rule for rule in NAMES if ("name", rule) not in used]
    idle += [rule for rule in SIGNATURES if ("call", rule) not in used]
    for backend, table in ARGUMENTS.items():
        idle += [(backend, name) for name in table if ("argument", (backend, name)) not in used]
    assert idle == []
