"""Text and audio networks of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .architecture import Architecture, Inputs

WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**WIDTH, "vocab_size": 40, "intermediate_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**TEXT, "num_key_value_heads": 2}
DISENTANGLED = {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
POSITIONS = {"max_position_embeddings": 32}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2}
SPEECH = {
    **WIDTH, "intermediate_size": 24, "vocab_size": 20, "conv_dim": (8, 8), "conv_stride": (4, 4),
    "conv_kernel": (8, 8),
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2,
}  # fmt: skip


def tokens() -> Inputs:
    return {"input_ids": torch.randint(3, 40, (2, 7))}


def causal() -> Inputs:
    return {**tokens(), "use_cache": False}


def pair() -> Inputs:
    return {**causal(), "decoder_input_ids": torch.randint(3, 40, (2, 5))}


def waves() -> Inputs:
    return {"input_values": torch.randn(2, 400)}


def listening() -> Inputs:
    return {
        "input_features": torch.randn(2, 8, 40),
        "decoder_input_ids": torch.randint(3, 40, (2, 5)),
        "use_cache": False,
    }


def spectrum() -> Inputs:
    return {"input_values": torch.randn(2, 32, 16)}


def of(name: str, model: str, inputs: Callable[[], Inputs], **options: Any) -> Architecture:
    """A network of transformers by its class; the configuration's class is that of the model."""

    def build() -> nn.Module:
        import transformers

        kind = getattr(transformers, model)
        made: nn.Module = kind(kind.config_class(**options))
        return made

    return Architecture(name, f"transformers.{model}", build, inputs)


LANGUAGE = (
    of("BERT", "BertForMaskedLM", tokens, **TEXT),
    of("RoBERTa", "RobertaForMaskedLM", tokens, **TEXT),
    of("DistilBERT", "DistilBertForMaskedLM", tokens, vocab_size=40, dim=16, n_layers=2, n_heads=4, hidden_dim=24),
    of("ALBERT", "AlbertForMaskedLM", tokens, **TEXT, embedding_size=8),
    of("ELECTRA", "ElectraForMaskedLM", tokens, **TEXT, embedding_size=8),
    of("MPNet", "MPNetForMaskedLM", tokens, **TEXT),
    of("DeBERTa", "DebertaForMaskedLM", tokens, **DISENTANGLED),
    of("DeBERTa v2 and v3", "DebertaV2ForMaskedLM", tokens, **DISENTANGLED),
    of("ModernBERT", "ModernBertForMaskedLM", tokens, **TEXT),
    of("GPT-2", "GPT2LMHeadModel", causal, vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=32),
    of("GPT-Neo", "GPTNeoForCausalLM", causal, vocab_size=40, hidden_size=16, num_layers=2, num_heads=4,
       attention_types=[[["global", "local"], 1]], max_position_embeddings=32),
    of("GPT-J", "GPTJForCausalLM", causal, vocab_size=40, n_embd=16, n_layer=2, n_head=4, rotary_dim=4, n_positions=32),
    of("GPT-NeoX, Pythia", "GPTNeoXForCausalLM", causal, **TEXT, **POSITIONS),
    of("GPT BigCode, StarCoder", "GPTBigCodeForCausalLM", causal, vocab_size=40, n_embd=16, n_layer=2, n_head=4,
       n_positions=32),
    of("CodeGen", "CodeGenForCausalLM", causal, vocab_size=40, n_embd=16, n_layer=2, n_head=4, rotary_dim=4,
       n_positions=32),
    of("OPT", "OPTForCausalLM", causal, **WIDTH, vocab_size=40, ffn_dim=24, word_embed_proj_dim=16, pad_token_id=1),
    of("BLOOM", "BloomForCausalLM", causal, vocab_size=40, hidden_size=16, n_layer=2, n_head=4),
    of("Falcon", "FalconForCausalLM", causal, **TEXT),
    of("MPT", "MptForCausalLM", causal, vocab_size=40, d_model=16, n_layers=2, n_heads=4, max_seq_len=32),
    of("Llama", "LlamaForCausalLM", causal, **GROUPED),
    of("Mistral", "MistralForCausalLM", causal, **GROUPED),
    of("Qwen 2", "Qwen2ForCausalLM", causal, **GROUPED),
    of("Qwen 3", "Qwen3ForCausalLM", causal, **GROUPED, head_dim=4),
    of("Gemma 2", "Gemma2ForCausalLM", causal, **GROUPED, head_dim=4),
    of("Gemma 3", "Gemma3ForCausalLM", causal, **GROUPED, head_dim=4),
    of("Phi-3", "Phi3ForCausalLM", causal, **GROUPED),
    of("Phi", "PhiForCausalLM", causal, **TEXT),
    of("StableLM", "StableLmForCausalLM", causal, **GROUPED),
    of("OLMo 2", "Olmo2ForCausalLM", causal, **GROUPED),
    of("GLM 4", "Glm4ForCausalLM", causal, **GROUPED, head_dim=4),
    of("Mixtral", "MixtralForCausalLM", causal, **EXPERTS, num_local_experts=4),
    of("Qwen 3 MoE", "Qwen3MoeForCausalLM", causal, **EXPERTS, head_dim=4, num_experts=4, moe_intermediate_size=8),
    of("gpt-oss", "GptOssForCausalLM", causal, **EXPERTS, head_dim=4, num_local_experts=4),
    of("DeepSeek V3", "DeepseekV3ForCausalLM", causal, **{**EXPERTS, "num_key_value_heads": 4}, n_routed_experts=4,
       n_group=2, topk_group=1, moe_intermediate_size=8, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
       qk_nope_head_dim=4, v_head_dim=4, first_k_dense_replace=1),
    of("Mamba", "MambaForCausalLM", causal, vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4),
    of("Mamba 2", "Mamba2ForCausalLM", causal, vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4,
       num_heads=4, head_dim=8, n_groups=2, chunk_size=4),
    of("T5", "T5ForConditionalGeneration", pair, vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4),
    of("T5 v1.1, FLAN-T5", "T5ForConditionalGeneration", pair, vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2,
       num_heads=4, feed_forward_proj="gated-gelu"),
    of("Switch Transformers", "SwitchTransformersForConditionalGeneration", pair, vocab_size=40, d_model=16, d_kv=4,
       d_ff=24, num_layers=2, num_heads=4, num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    of("BART", "BartForConditionalGeneration", pair, vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2,
       encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24,
       max_position_embeddings=32),
    of("Whisper", "WhisperForConditionalGeneration", listening, vocab_size=40, d_model=16, encoder_layers=2,
       decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24,
       num_mel_bins=8, max_source_positions=20, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
       decoder_start_token_id=1),
    of("wav2vec 2.0", "Wav2Vec2ForCTC", waves, **SPEECH),
    of("HuBERT", "HubertForCTC", waves, **SPEECH),
    of("WavLM", "WavLMForCTC", waves, **SPEECH),
    of("Audio Spectrogram Transformer", "ASTForAudioClassification", spectrum, **WIDTH, intermediate_size=24,
       patch_size=8, frequency_stride=8, time_stride=8, max_length=32, num_mel_bins=16),
)  # fmt: skip
