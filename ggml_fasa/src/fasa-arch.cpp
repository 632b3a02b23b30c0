// Which architectures FASA can serve: one table over every one that llama.cpp knows. It says what an architecture as such
// cannot do; what a model file decides (layers without rotary embedding, ALiBi in some sizes, rotary embedding with sections)
// is asked of its hparams and of its calibration. docs/architectures.md is generated from it.

#include "llama-fasa.h"

#include "llama-arch.h"


namespace {

enum class refusal {
    NONE,
    NOT_LISTED,
    NOT_A_TEXT_MODEL,
    ENCODER,
    DIFFUSION,
    RECURRENT,
    NO_ROPE,
    ALIBI,
    RELATIVE_BIAS,
    M_ROPE,
    LATENT,
    OWN_SPARSE,
    DRAFT,
    NO_FLASH_ATTENTION,
    NOT_LOADABLE,
};

refusal refusal_of(llm_arch arch) {
    switch (arch) {
        // attention over cached K with rotary planes in the first dims of a head, in all layers or in some
        case LLM_ARCH_AFMOE:
        case LLM_ARCH_APERTUS:
        case LLM_ARCH_ARCEE:
        case LLM_ARCH_ARCTIC:
        case LLM_ARCH_BAICHUAN:
        case LLM_ARCH_BAILINGMOE:
        case LLM_ARCH_BAILINGMOE2:
        case LLM_ARCH_BITNET:
        case LLM_ARCH_CHAMELEON:
        case LLM_ARCH_CHATGLM:
        case LLM_ARCH_CODESHELL:
        case LLM_ARCH_COGVLM:
        case LLM_ARCH_COHERE2:
        case LLM_ARCH_COHERE2MOE:
        case LLM_ARCH_COMMAND_R:
        case LLM_ARCH_DBRX:
        case LLM_ARCH_DECI:
        case LLM_ARCH_DEEPSEEK:
        case LLM_ARCH_DEEPSEEK2OCR:
        case LLM_ARCH_DOTS1:
        case LLM_ARCH_ERNIE4_5:
        case LLM_ARCH_ERNIE4_5_MOE:
        case LLM_ARCH_EXAONE:
        case LLM_ARCH_EXAONE4:
        case LLM_ARCH_EXAONE_MOE:
        case LLM_ARCH_FALCON:
        case LLM_ARCH_FALCON_H1:
        case LLM_ARCH_GEMMA:
        case LLM_ARCH_GEMMA2:
        case LLM_ARCH_GEMMA3:
        case LLM_ARCH_GEMMA3N:
        case LLM_ARCH_GEMMA4:
        case LLM_ARCH_GLM4:
        case LLM_ARCH_GLM4_MOE:
        case LLM_ARCH_GPTNEOX:
        case LLM_ARCH_GRANITE:
        case LLM_ARCH_GRANITE_HYBRID:
        case LLM_ARCH_GRANITE_MOE:
        case LLM_ARCH_GRANITE_SWA:
        case LLM_ARCH_GRANITE_SWITCH:
        case LLM_ARCH_GROVEMOE:
        case LLM_ARCH_HRM_TEXT:
        case LLM_ARCH_HUNYUAN_DENSE:
        case LLM_ARCH_HUNYUAN_MOE:
        case LLM_ARCH_HUNYUAN_VL:
        case LLM_ARCH_HY_V3:
        case LLM_ARCH_INTERNLM2:
        case LLM_ARCH_JAIS2:
        case LLM_ARCH_LAGUNA:
        case LLM_ARCH_LFM2:
        case LLM_ARCH_LFM2MOE:
        case LLM_ARCH_LLAMA:
        case LLM_ARCH_LLAMA4:
        case LLM_ARCH_MAINCODER:
        case LLM_ARCH_MAPLE:
        case LLM_ARCH_MELLUM:
        case LLM_ARCH_MIMO2:
        case LLM_ARCH_MINICPM:
        case LLM_ARCH_MINIMAX_01:
        case LLM_ARCH_MINIMAX_M2:
        case LLM_ARCH_MISTRAL3:
        case LLM_ARCH_MUSE_GLIMMER:
        case LLM_ARCH_NANBEIGE:
        case LLM_ARCH_NEMOTRON:
        case LLM_ARCH_OLMO:
        case LLM_ARCH_OLMO2:
        case LLM_ARCH_OLMOE:
        case LLM_ARCH_OPENAI_MOE:
        case LLM_ARCH_OPENELM:
        case LLM_ARCH_ORION:
        case LLM_ARCH_PANGU_EMBED:
        case LLM_ARCH_PHI2:
        case LLM_ARCH_PHI3:
        case LLM_ARCH_PHIMOE:
        case LLM_ARCH_PLAMO:
        case LLM_ARCH_PLAMO2:
        case LLM_ARCH_PLAMO3:
        case LLM_ARCH_QWEN:
        case LLM_ARCH_QWEN2:
        case LLM_ARCH_QWEN2MOE:
        case LLM_ARCH_QWEN3:
        case LLM_ARCH_QWEN3MOE:
        case LLM_ARCH_QWEN3NEXT:
        case LLM_ARCH_SEED_OSS:
        case LLM_ARCH_SMALLTHINKER:
        case LLM_ARCH_SMOLLM3:
        case LLM_ARCH_SPARK2_5:
        case LLM_ARCH_STABLELM:
        case LLM_ARCH_STARCODER2:
        case LLM_ARCH_STEP35:
        case LLM_ARCH_TALKIE:
        case LLM_ARCH_XVERSE:
            return refusal::NONE;

        case LLM_ARCH_CLIP:
        case LLM_ARCH_POCKETTTS:
        case LLM_ARCH_WAVTOKENIZER_DEC:
            return refusal::NOT_A_TEXT_MODEL;

        case LLM_ARCH_BERT:
        case LLM_ARCH_EUROBERT:
        case LLM_ARCH_GEMMA_EMBEDDING:
        case LLM_ARCH_JINA_BERT_V2:
        case LLM_ARCH_JINA_BERT_V3:
        case LLM_ARCH_LLAMA_EMBED:
        case LLM_ARCH_MODERN_BERT:
        case LLM_ARCH_NEO_BERT:
        case LLM_ARCH_NOMIC_BERT:
        case LLM_ARCH_NOMIC_BERT_MOE:
        case LLM_ARCH_T5ENCODER:
            return refusal::ENCODER;

        case LLM_ARCH_DREAM:
        case LLM_ARCH_LLADA:
        case LLM_ARCH_LLADA_MOE:
        case LLM_ARCH_RND1:
            return refusal::DIFFUSION;

        case LLM_ARCH_ARWKV7:
        case LLM_ARCH_MAMBA:
        case LLM_ARCH_MAMBA2:
        case LLM_ARCH_RWKV6:
        case LLM_ARCH_RWKV6QWEN2:
        case LLM_ARCH_RWKV7:
            return refusal::RECURRENT;

        case LLM_ARCH_GPT2:
        case LLM_ARCH_JAMBA:
        case LLM_ARCH_NEMOTRON_H:
        case LLM_ARCH_NEMOTRON_H_MOE:
        case LLM_ARCH_STARCODER:
            return refusal::NO_ROPE;

        case LLM_ARCH_BLOOM:
        case LLM_ARCH_JAIS:
        case LLM_ARCH_MPT:
        case LLM_ARCH_REFACT:
            return refusal::ALIBI;

        case LLM_ARCH_T5:
            return refusal::RELATIVE_BIAS;

        case LLM_ARCH_PADDLEOCR:
        case LLM_ARCH_QWEN2VL:
        case LLM_ARCH_QWEN35:
        case LLM_ARCH_QWEN35MOE:
        case LLM_ARCH_QWEN3TTS:
        case LLM_ARCH_QWEN3VL:
        case LLM_ARCH_QWEN3VLMOE:
            return refusal::M_ROPE;

        case LLM_ARCH_BAILINGMOE3:
        case LLM_ARCH_DEEPSEEK2:
        case LLM_ARCH_KIMI_K3:
        case LLM_ARCH_KIMI_LINEAR:
        case LLM_ARCH_MINICPM3:
        case LLM_ARCH_MISTRAL4:
        case LLM_ARCH_PLM:
            return refusal::LATENT;

        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_DEEPSEEK4:
        case LLM_ARCH_DOTS3NOTE:
        case LLM_ARCH_GLM5_NEXT:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_HY_V4:
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_QWEN4EXP:
            return refusal::OWN_SPARSE;

        case LLM_ARCH_DFLASH:
        case LLM_ARCH_EAGLE3:
        case LLM_ARCH_GEMMA4_ASSISTANT:
            return refusal::DRAFT;

        case LLM_ARCH_GROK:
            return refusal::NO_FLASH_ATTENTION;

        case LLM_ARCH_GPTJ:
            return refusal::NOT_LOADABLE;

        case LLM_ARCH_UNKNOWN:
            break;
    }
    return refusal::NOT_LISTED;
}

} // namespace

int32_t llama_fasa_n_arch(void) {
    return LLM_ARCH_UNKNOWN;
}

const char * llama_fasa_arch_name(int32_t arch) {
    return llm_arch_name((llm_arch) arch);
}

const char * llama_fasa_arch_refusal(int32_t arch) {
    switch (refusal_of((llm_arch) arch)) {
        case refusal::NONE:               return "";
        case refusal::NOT_A_TEXT_MODEL:   return "the model does not generate text";
        case refusal::ENCODER:            return "an encoder reads its text at once and caches no K";
        case refusal::DIFFUSION:          return "a diffusion model attends to all of its text and caches no K";
        case refusal::RECURRENT:          return "a recurrent model has no attention";
        case refusal::NO_ROPE:            return "attention without rotary embedding has no rotary planes";
        case refusal::ALIBI:              return "ALiBi has no rotary planes";
        case refusal::RELATIVE_BIAS:      return "attention with a relative position bias has no rotary planes";
        case refusal::M_ROPE:             return "M-RoPE is not supported";
        case refusal::LATENT:             return "multi-head latent attention has no rotary planes in the first dims of a head";
        case refusal::OWN_SPARSE:         return "the model selects tokens by an index of its own";
        case refusal::DRAFT:              return "the model only drafts tokens for another one";
        case refusal::NO_FLASH_ATTENTION: return "llama.cpp runs the model without flash attention";
        case refusal::NOT_LOADABLE:       return "llama.cpp cannot load the model";
        case refusal::NOT_LISTED:         break;
    }
    return nullptr;
}
