// Mapped host memory: the backend's own pinned buffers under types of ours, by which the backend knows that its kernels may
// use them in place. See ggml-fasa-mapped.h.

#include "ggml-fasa-mapped.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#include <cstring>
#include <deque>
#include <mutex>
#include <string>

struct mapped_type {
    ggml_backend_buffer_type   type;
    ggml_backend_buffer_type_t pinned;
    std::string                name;
};

static ggml_backend_buffer_type_t pinned_of(ggml_backend_buffer_type_t buft) {
    return ((const mapped_type *) buft->context)->pinned;
}

static const char * mapped_name(ggml_backend_buffer_type_t buft) {
    return ((const mapped_type *) buft->context)->name.c_str();
}

static ggml_backend_buffer_t mapped_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(pinned_of(buft), size);
    if (buffer && buffer->buft == pinned_of(buft)) {
        buffer->buft = buft;
        return buffer;
    }
    ggml_backend_buffer_free(buffer); // pageable, in place of pinned memory
    GGML_LOG_ERROR("FASA: could not pin %.0f MiB of host memory for K and V: use a smaller context (-c), a smaller KV type, or "
            "allow more locked memory\n", size/1024.0/1024.0);
    return nullptr;
}

static size_t mapped_alignment(ggml_backend_buffer_type_t buft) {
    return ggml_backend_buft_get_alignment(pinned_of(buft));
}

static bool mapped_is_host(ggml_backend_buffer_type_t) {
    return true;
}

ggml_backend_buffer_type_t ggml_fasa_mapped_buffer_type(ggml_backend_dev_t dev) {
    ggml_backend_reg_t         reg    = ggml_backend_dev_backend_reg(dev);
    ggml_backend_buffer_type_t pinned = ggml_backend_dev_host_buffer_type(dev);
    if (!pinned || strcmp(ggml_backend_reg_name(reg), "CUDA") != 0) {
        return nullptr;
    }
    static std::mutex              mutex;
    static std::deque<mapped_type> types; // which stay where they are

    const std::lock_guard<std::mutex> lock(mutex);
    for (mapped_type & mapped : types) {
        if (mapped.type.device == dev) {
            return &mapped.type;
        }
    }
    mapped_type & mapped = types.emplace_back();
    mapped.pinned = pinned;
    mapped.name   = std::string(ggml_backend_dev_name(dev)) + "_FASA_Mapped";
    mapped.type   = {
        /* .iface   = */ { mapped_name, mapped_alloc, mapped_alignment, nullptr, nullptr, mapped_is_host },
        /* .device  = */ dev,
        /* .context = */ &mapped,
    };
    return &mapped.type;
}

bool ggml_fasa_buft_is_mapped(ggml_backend_buffer_type_t buft) {
    return buft && buft->iface.alloc_buffer == mapped_alloc;
}

bool ggml_fasa_buft_is_mapped_into(ggml_backend_buffer_type_t buft, ggml_backend_dev_t dev) {
    return ggml_fasa_buft_is_mapped(buft) && buft->device == dev;
}
