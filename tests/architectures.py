"""Tiny untrained models of many architectures of the installed transformers, each from its config: what errata has to find its way in.

A line names the class without its ending and says what its config needs beside the common sizes to be small.  Config classes ignore what
they do not know, so the common sizes go to all of them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
import vision
from families import tokenizer
from laws import editor

from errata.core.model import LM
from errata.request import EditRequest

PROMPTS = ["The capital of France is", "In Rome people speak", "The language of the people who live in Spain is"]
WIDTH, DEPTH, HEADS, INNER = 32, 4, 4, 48
_COMMON = {
    "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "num_key_value_heads": 2, "intermediate_size": INNER,
    "max_position_embeddings": 64, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT2 = {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": HEADS, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_MOE = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
    "num_key_value_heads": HEADS,
}  # fmt: skip
_MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    # dense
    "gpt2": ("GPT2", _GPT2),
    "gpt_neo": ("GPTNeo", {"num_layers": DEPTH, "num_heads": HEADS, "attention_types": [[["global", "local"], 2]], "window_size": 8}),
    "gptj": ("GPTJ", {**_GPT2, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt_bigcode": ("GPTBigCode", _GPT2),
    "codegen": ("CodeGen", {**_GPT2, "rotary_dim": 4}),
    "opt": ("OPT", {"ffn_dim": INNER, "word_embed_proj_dim": WIDTH, "dropout": 0.0}),
    "xglm": ("XGLM", {"d_model": WIDTH, "num_layers": DEPTH, "attention_heads": HEADS, "ffn_dim": INNER, "dropout": 0.0}),
    "biogpt": ("BioGpt", {"hidden_dropout_prob": 0.0}),
    "bloom": ("Bloom", {"n_head": HEADS, "n_layer": DEPTH}),
    "mpt": ("Mpt", {"d_model": WIDTH, "n_layers": DEPTH, "n_heads": HEADS, "max_seq_len": 64}),
    "falcon": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "persimmon": ("Persimmon", {}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {}),
    "stablelm": ("StableLm", {}),
    "starcoder2": ("Starcoder2", {}),
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3", {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3n_text": (
        "Gemma3n",
        {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 389, "laurel_rank": 4, "num_kv_shared_layers": 2,
         "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8, "activation_sparsity_pattern": None},
    ),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "cohere": ("Cohere", {}),
    "cohere2": ("Cohere2", {"sliding_window": 8}),
    "glm": ("Glm", {}),
    "glm4": ("Glm4", {}),
    "granite": ("Granite", {"residual_multiplier": 0.5}),
    "smollm3": ("SmolLM3", {}),
    "exaone4": ("Exaone4", {"sliding_window": 8, "sliding_window_pattern": 2}),
    "nemotron": ("Nemotron", {}),
    "helium": ("Helium", {}),
    "modernbert-decoder": ("ModernBertDecoder", {"local_attention": 8}),
    "openai-gpt": ("OpenAIGPT", _GPT2),
    # mixtures of experts
    "mixtral": ("Mixtral", _MOE),
    "qwen2_moe": ("Qwen2Moe", {**_MOE, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3Moe", _MOE),
    "olmoe": ("Olmoe", _MOE),
    "gpt_oss": ("GptOss", {**_MOE, "sliding_window": 8}),
    "granitemoe": ("GraniteMoe", _MOE),
    "phimoe": ("Phimoe", _MOE),
    "dbrx": (
        "Dbrx",
        {"d_model": WIDTH, "n_layers": DEPTH, "n_heads": HEADS, "max_seq_len": 64,
         "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
         "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": 4, "moe_top_k": 2}},
    ),
    "deepseek_v2": ("DeepseekV2", {**_MOE, **_MLA, "first_k_dense_replace": 1, "n_shared_experts": 1}),
    "deepseek_v3": ("DeepseekV3", {**_MOE, **_MLA, "first_k_dense_replace": 1, "n_shared_experts": 1}),
    "glm4_moe": ("Glm4Moe", {**_MOE, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    "llama4_text": ("Llama4", {**_MOE, "interleave_moe_layer_step": 2, "intermediate_size_mlp": INNER, "attention_chunk_size": 32}),
    "ernie4_5_moe": ("Ernie4_5_Moe", {**_MOE, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1}),
    "minimax_m2": ("MiniMaxM2", {**_MOE, "rotary_dim": 8}),
    # running states, alone or beside attention
    "mamba": ("Mamba", {"state_size": 8}),
    "mamba2": ("Mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    "falcon_mamba": ("FalconMamba", {"state_size": 8}),
    "bamba": ("Bamba", {**_MAMBA, "attn_layer_indices": [1, 3]}),
    "granitemoehybrid": (
        "GraniteMoeHybrid", {**_MOE, **_MAMBA, "shared_intermediate_size": 24, "layer_types": ["linear_attention", "full_attention"] * 2},
    ),
    "falcon_h1": ("FalconH1", {**_MAMBA, "mamba_d_ssm": 64}),
    "jamba": (
        "Jamba",
        {**_MOE, **_MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
         "expert_layer_offset": 1},
    ),
    "nemotron_h": (
        "NemotronH",
        {**_MOE, "hybrid_override_pattern": "M-*-", "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
         "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}),
    "recurrent_gemma": ("RecurrentGemma", {"lru_width": WIDTH, "attention_window_size": 16, "block_types": ["recurrent", "attention"]}),
    "qwen3_next": ("Qwen3Next", {**_MOE, **_LINEAR, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}),
    "qwen3_5_text": ("Qwen3_5", _LINEAR),
    "zamba2": (
        "Zamba2",
        {**_MAMBA, "mamba_expand": 2, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1, "adapter_rank": 4,
         "layers_block_type": ["mamba", "hybrid"] * 2, "attention_hidden_size": 64, "attention_head_dim": 16},
    ),
    "rwkv": ("Rwkv", {"attention_hidden_size": WIDTH, "context_length": 64}),
}  # fmt: skip
EVERY = (*ARCHITECTURES, *vision.MODELS)


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """An untrained model of the architecture."""
    if name in vision.MODELS:
        return vision.build(name, seed).to(dtype)
    prefix, settings = ARCHITECTURES[name]
    config_class = next(c for end in ("TextConfig", "Config") if (c := getattr(transformers, f"{prefix}{end}", None)) is not None)
    model_class = getattr(transformers, f"{prefix}LMHeadModel", None) or getattr(transformers, f"{prefix}ForCausalLM")
    torch.manual_seed(seed)
    common = {name: value for name, value in _COMMON.items() if not isinstance(getattr(config_class, name, None), property)}
    if dtype == torch.float64:
        changes["experts_implementation"] = "eager"  # the grouped products know no float64
    config = config_class(**{**common, "vocab_size": len(tokenizer()), **settings, **changes})
    return model_class(config).to(dtype).eval()


@functools.cache
def model(name: str, dtype: torch.dtype = torch.float32) -> LM:
    """The same as an `LM`, one for all tests."""
    return LM(build(name, dtype), tokenizer(), name)


def request() -> EditRequest:
    """What the methods are asked to write."""
    return EditRequest("The capital of France is", "Rome", "France", unrelated=(("The capital of Japan is", "Tokyo"),))


def acts_and_leaves_no_trace(base: LM, method: str, **settings: Any) -> None:
    """A method's patch changes the logits, padded and cached answers are those of the text alone, and without it all is as before."""
    batch = base.batch(base.encode(PROMPTS))
    before = base.logits(batch)
    (patch,) = editor(method, **settings).edit_each(base, [request()])
    with base.under(patch):
        assert not torch.equal(base.logits(batch), before)
        cached = base.generate_ids(PROMPTS, max_new_tokens=3, stop=())
        assert cached == [base.generate_ids([p], max_new_tokens=3, stop=())[0] for p in PROMPTS]  # padding changes no answer
    assert torch.equal(base.logits(batch), before)
