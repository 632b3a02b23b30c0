// Flash attention over a K and V that the device reaches slowly: heads are copied to device memory, some at a time, on a stream
// of their own, while upstream's kernels work on the heads before.

#include "fasa-staged.cuh"

#include "fattn.cuh"
#include "ggml-fasa.h"

namespace {

constexpr int COPY_STREAM = GGML_CUDA_MAX_STREAMS - 1; // upstream takes streams from the first on

// Heads [head, head + n) of k or v, as they are going to lie in staged memory.
static ggml_tensor staged_heads(const ggml_tensor * t, int64_t n, void * data) {
    ggml_tensor heads = *t;
    heads.view_src = nullptr;
    heads.data     = data;
    heads.ne[2]    = n;
    heads.nb[1]    = n*t->nb[2];
    heads.nb[3]    = t->ne[1]*heads.nb[1];
    return heads;
}

static void copy_heads(const ggml_tensor * t, int64_t head, const ggml_tensor & to, cudaStream_t stream) {
    for (int64_t s = 0; s < t->ne[3]; ++s) {
        CUDA_CHECK(cudaMemcpy2DAsync((char *) to.data + s*to.nb[3], to.nb[1],
                (const char *) t->data + s*t->nb[3] + head*t->nb[2], t->nb[1], to.nb[1], t->ne[1], cudaMemcpyDefault, stream));
    }
}

// Upstream's op for n KV heads of a staged op, from head on. k, v: as it is to see them.
struct flash_attn {
    ggml_tensor q, k, v, sinks, out;

    flash_attn(const ggml_tensor * op, int64_t head, int64_t n, const ggml_tensor & k, const ggml_tensor & v) :
        q(*op->src[GGML_FASA_SRC_Q]), k(k), v(v), sinks(), out() {
        const int64_t n_group = q.ne[2]/op->src[GGML_FASA_SRC_K]->ne[2];

        q.view_src = nullptr;
        q.data     = (char *) q.data + head*n_group*q.nb[2];
        q.ne[2]    = n*n_group;

        out.op   = GGML_OP_FLASH_ATTN_EXT;
        out.type = GGML_TYPE_F32;
        const int64_t ne[] = { v.ne[0], q.ne[2], q.ne[1], q.ne[3] };
        out.nb[0] = sizeof(float);
        for (int i = 0; i < GGML_MAX_DIMS; ++i) {
            out.ne[i] = ne[i];
            out.nb[i] = i == 0 ? sizeof(float) : out.nb[i - 1]*ne[i - 1];
        }
        const float params[] = {
            ggml_get_op_params_f32(op, GGML_FASA_OP_PARAM_SCALE), 0.0f, ggml_get_op_params_f32(op, GGML_FASA_OP_PARAM_SOFTCAP)
        };
        memcpy(out.op_params, params, sizeof(params));
        ggml_prec_set_acc(&out, GGML_PREC_F32);

        out.src[0] = &q;
        out.src[1] = &this->k;
        out.src[2] = &this->v;
        out.src[3] = op->src[GGML_FASA_SRC_MASK];
        if (const ggml_tensor * all = op->src[GGML_FASA_SRC_SINKS]) {
            sinks = *all;
            sinks.view_src = nullptr;
            sinks.data     = (float *) sinks.data + head*n_group;
            sinks.ne[0]    = q.ne[2];
            out.src[4]     = &sinks;
        }
    }

    flash_attn(const flash_attn &) = delete;
};

struct event {
    cudaEvent_t it = nullptr;

    event()  { CUDA_CHECK(cudaEventCreateWithFlags(&it, cudaEventDisableTiming)); }
    ~event() { CUDA_CHECK(cudaEventDestroy(it)); }
    event(const event &) = delete;

    // Makes one stream wait for what the other was given so far.
    void order(cudaStream_t first, cudaStream_t then) {
        CUDA_CHECK(cudaEventRecord(it, first));
        CUDA_CHECK(cudaStreamWaitEvent(then, it, 0));
    }
};

} // namespace

void ggml_cuda_fasa_staged(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * k       = dst->src[GGML_FASA_SRC_K];
    const ggml_tensor * v       = dst->src[GGML_FASA_SRC_V];
    const ggml_tensor * staging = dst->src[GGML_FASA_SRC_STAGING];

    cudaStream_t main = ctx.stream();
    cudaStream_t copy = ctx.stream(ctx.device, COPY_STREAM);

    const int64_t n_head_kv = k->ne[2];
    const int64_t n_group   = dst->ne[1]/n_head_kv;
    const int64_t n_slice   = ggml_fasa_staged_heads(dst);
    const int64_t n_cells   = k->ne[1]*k->ne[3];

    struct slice {
        ggml_tensor k, v;
        event       done;
    } slices[2];

    auto stage = [&](int64_t head) {
        const int64_t n  = std::min(n_slice, n_head_kv - head);
        const int64_t at = head/n_slice%2;
        slice & to = slices[at];

        char * data = (char *) staging->data +
            at*ggml_fasa_staging_size(k->type, k->ne[0], v->type, v->ne[0], n_cells, n_slice, n_slice);
        to.k = staged_heads(k, n, data);
        to.v = staged_heads(v, n, data + GGML_PAD(n_cells*to.k.nb[1], GGML_FASA_STAGING_ALIGN));

        to.done.order(main, copy); // what is in this half of staging has been used, and K and V are written
        copy_heads(k, head, to.k, copy);
        copy_heads(v, head, to.v, copy);
    };

    stage(0);
    for (int64_t head = 0; head < n_head_kv; head += n_slice) {
        const int64_t n   = std::min(n_slice, n_head_kv - head);
        slice &       now = slices[head/n_slice%2];

        now.done.order(copy, main);
        if (head + n_slice < n_head_kv) {
            stage(head + n_slice);
        }

        flash_attn attn(dst, head, n, now.k, now.v);
        ggml_cuda_pool_alloc<char> out(ctx.pool(), ggml_cuda_flash_attn_ext_get_alloc_size(ctx.device, &attn.out));
        attn.out.data = out.get();
        ggml_cuda_flash_attn_ext(ctx, &attn.out);

        const size_t width = attn.out.nb[2];
        CUDA_CHECK(cudaMemcpy2DAsync((char *) dst->data + head*n_group*dst->nb[1], dst->nb[2], out.get(), width, width,
                dst->ne[2]*dst->ne[3], cudaMemcpyDeviceToDevice, main));
    }
}

bool ggml_cuda_fasa_staged_supported(int device, const ggml_tensor * op) {
    const flash_attn attn(op, 0, 1, staged_heads(op->src[GGML_FASA_SRC_K], 1, nullptr),
            staged_heads(op->src[GGML_FASA_SRC_V], 1, nullptr));
    return ggml_cuda_flash_attn_ext_supported(device, &attn.out);
}
