// The row cache on CUDA: K and V rows of the cells that a unit selected in its last step, in memory of the device, for a K and
// V in host memory. Neighbouring steps select much the same cells, and what is here need not be read over the bus.
//
// A unit has two halves that take turns: a step reads rows from the half that the last step wrote, and writes the rows of all its
// cells into the other one. The block of a unit that finishes last turns them. Rows are copies, so results are the same bits
// with the cache as without.

#pragma once

#include "fasa-launch.cuh"
#include "ggml-fasa.h"

namespace fasa {

// One for each KV head and stream; tags [2][n_rows] follow: the cells whose rows each half holds.
struct row_state {
    uint32_t turn;    // steps so far; its lowest bit is the half that the next one writes
    uint32_t n[2];    // rows in each half, may count beyond n_rows
    uint32_t unused;
    unsigned long long n_hit, n_miss;
};

static_assert(sizeof(row_state) == GGML_FASA_ROW_STATE*sizeof(int32_t));

constexpr uint32_t ROW_NONE = 0xFFFFFFFFu; // tag of a row that is no longer its cell's

struct row_args {
    char * state; // NULL: no row cache
    char * rows;
    size_t state_nb2, state_nb3; // from head to head, from stream to stream
    size_t rows_nb2, rows_nb3;
    int    n_rows;  // of a half
    int    d_k, d_v;
    int    n_slot;  // of the table that finds a cell, a power of two

    __host__ __device__ int known() const { return state ? n_rows : 0; }
    __host__ __device__ int slots() const { return state ? n_slot : 0; }
};

// What a block needs of it, in shared memory, as words of 4 bytes: the tags of the last half, a hash table over them, for each
// cell of the block's list the row where it is, and a word that the block shares.
static __host__ __device__ __forceinline__ size_t row_shared(const row_args & r, int list_len) {
    return r.state ? ((size_t) r.known() + r.slots() + list_len + 1 + 3)/4*4 : 0;
}

struct row_cache {
    row_state  * state;
    uint32_t   * fill;  // rows in the half that is written
    uint32_t   * tags;  // of the half that is written
    const char * from;  // rows of the half that is read
    char       * to;    // rows of the half that is written
    uint32_t   * known; // shared memory, see row_shared
    uint32_t   * slot;
    int32_t    * where;
    int32_t    * base;
    uint32_t     mine;  // first row of this block's list in the half that is written; of thread 0 until it is shared
    int          n_rows, n_slot, row_size;

    // Call by all threads of a block before its first cells are known. Reads what earlier launches left.
    __device__ void open(const row_args & r, int s, int g, uint32_t * shared, int list_len) {
        n_rows   = r.n_rows;
        n_slot   = r.n_slot;
        row_size = (r.d_k + r.d_v)*sizeof(half);
        state    = (row_state *) (r.state + s*r.state_nb3 + g*r.state_nb2);
        known    = shared;
        slot     = known + n_rows;
        where    = (int32_t *) (slot + n_slot);
        base     = where + list_len;

        const int now = state->turn & 1;
        uint32_t * all = (uint32_t *) (state + 1);
        char     * rows = r.rows + s*r.rows_nb3 + g*r.rows_nb2;
        fill = &state->n[now];
        tags = all  + now*n_rows;
        to   = rows + (size_t) now*n_rows*row_size;
        from = rows + (size_t) (1 - now)*n_rows*row_size;

        const uint32_t * last = all + (1 - now)*n_rows;
        const int        n    = min(state->n[1 - now], n_rows);
        for (int i = threadIdx.x; i < n_slot; i += blockDim.x) {
            slot[i] = 0;
        }
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            known[i] = last[i];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            if (known[i] == ROW_NONE) {
                continue;
            }
            uint32_t h = hash(known[i]);
            while (atomicCAS(&slot[h], 0, i + 1) != 0) {
                h = (h + 1) & (n_slot - 1);
            }
        }
        __syncthreads();
    }

    // Call by all threads of a block: looks up the n cells of list.
    __device__ void find(const int32_t * list, int n) {
        if (threadIdx.x == 0) {
            mine = atomicAdd(fill, n);
        }
        int n_hit = 0;
        for (int c0 = 0; c0 < n; c0 += blockDim.x) {
            const int c = c0 + threadIdx.x;
            int row = -1;
            if (c < n) {
                const uint32_t cell = list[c];
                uint32_t h = hash(cell);
                while (slot[h] != 0 && known[slot[h] - 1] != cell) {
                    h = (h + 1) & (n_slot - 1);
                }
                row = (int) slot[h] - 1;
                where[c] = row;
            }
            n_hit += __syncthreads_count(row >= 0);
        }
        if (threadIdx.x == 0 && n > 0) {
            atomicAdd(&state->n_hit,  n_hit);
            atomicAdd(&state->n_miss, n - n_hit);
        }
    }

    // Call by all threads of a block after find, when its first rows are on their way: the answer to find's question where the rows
    // go is waited for here.
    __device__ void place(const int32_t * list, int n) {
        if (threadIdx.x == 0) {
            *base = mine;
        }
        __syncthreads();
        mine = *base;
        for (int c = threadIdx.x; c < n; c += blockDim.x) {
            if (mine + c < n_rows) {
                tags[mine + c] = list[c];
            }
        }
        __syncthreads();
    }

    // Where the K and V row of cell c of the list are, if they are here; else leaves k and v as they are.
    __device__ __forceinline__ void redirect(int c, int d_k, const char * & k, const char * & v) const {
        const int row = where[c];
        if (row >= 0) {
            k = from + (size_t) row*row_size;
            v = k + d_k*sizeof(half);
        }
    }

    // Keeps values 8 * l .. + 7 of the K and V row of cell c.
    __device__ __forceinline__ void keep(int c, int l, int d_k, int d_v, const uint4 & k, const uint4 & v) const {
        if (mine + c >= n_rows) {
            return;
        }
        char * row = to + (size_t) (mine + c)*row_size;
        if (8*l < d_k) {
            *(uint4 *) (row + 16*l) = k;
        }
        if (8*l < d_v) {
            *(uint4 *) (row + d_k*sizeof(half) + 16*l) = v;
        }
    }

    // Call by one thread, when every block of the unit is done.
    __device__ void turn() {
        const int next = 1 - (state->turn & 1);
        state->n[next] = 0;
        state->turn++;
    }

private:
    __device__ __forceinline__ uint32_t hash(uint32_t cell) const {
        return (cell*2654435761u >> 16) & (n_slot - 1);
    }
};

// A K and V of a cell were written: its row is no longer true. By the lanes of a warp.
static __device__ __forceinline__ void row_forget(char * at, int n_rows, uint32_t cell, int lane) {
    const row_state * state = (const row_state *) at;
    const int last = 1 - (state->turn & 1);
    uint32_t * tags = (uint32_t *) (state + 1) + last*n_rows;
    const int n = min(state->n[last], n_rows);
    for (int i = lane; i < n; i += WARP_SIZE) {
        if (tags[i] == cell) {
            tags[i] = ROW_NONE;
        }
    }
}

} // namespace fasa
