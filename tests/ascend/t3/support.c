/* What LLVM's code for a lowered kernel calls and the C library lacks. */
#include <stdint.h>
#include <string.h>

/* Rounds to the nearest bfloat16, ties to even; the result is the low half of the register. */
float __truncsfbf2(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits = x != x ? 0x7FC0 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  memcpy(&x, &bits, 4);
  return x;
}

typedef struct { char *allocated, *aligned; int64_t offset, sizes_and_strides[]; } Strided;
typedef struct { int64_t rank; Strided *at; } Array;

static void copy(int64_t bytes, int64_t rank, const int64_t *sizes, const int64_t *from_strides,
                 const int64_t *to_strides, const char *from, char *to) {
  if (rank == 0) { memcpy(to, from, bytes); return; }
  for (int64_t i = 0; i < sizes[0]; i++)
    copy(bytes, rank - 1, sizes + 1, from_strides + 1, to_strides + 1,
         from + i * from_strides[0] * bytes, to + i * to_strides[0] * bytes);
}

/* MLIR's copy between arrays of any strides. */
void memrefCopy(int64_t bytes, Array *from, Array *to) {
  const int64_t *a = from->at->sizes_and_strides, *b = to->at->sizes_and_strides;
  copy(bytes, from->rank, a, a + from->rank, b + from->rank,
       from->at->aligned + from->at->offset * bytes, to->at->aligned + to->at->offset * bytes);
}
