// Vectors of LANE_BYTES bytes, and matrices whose columns are in their lanes. Included once per instruction set.

template <class T>
constexpr int L = LANE_BYTES / sizeof(T);  // numbers in a vector

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(LANE_BYTES)));
};
template <class T>
using Lanes = typename Vector<T>::type;

// Half a vector: the lower lanes of one.
template <class T>
struct HalfVector {
  typedef T type __attribute__((vector_size(LANE_BYTES / 2)));
};
template <class T>
using HalfLanes = typename HalfVector<T>::type;

template <class T, int... I>
INLINE HalfLanes<T> lower(Lanes<T> x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, I...);
}
// A vector as type V: the vector itself, or its lower half.
template <class T, class V>
INLINE V as(Lanes<T> x) {
  if constexpr (std::is_same_v<V, Lanes<T>>) return x;
  else return lower<T>(x, std::make_integer_sequence<int, L<T> / 2>());
}

template <class T>
INLINE Lanes<T> load(const T* from) {
  Lanes<T> x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

// The same as type T, from numbers of type S.
template <class T, class S>
INLINE Lanes<T> load_as(const S* from) {
  return load(from);
}

template <class A, class B>
INLINE void convert(const A* from, int64_t n, B* to) {
  if constexpr (std::is_same_v<A, B>) return void(std::copy_n(from, n, to));
  for (int64_t i = 0; i < n; ++i) to[i] = B(from[i]);
}

template <class T>
INLINE void store(T* to, Lanes<T> x) {
  __builtin_memcpy(to, &x, sizeof x);
}

template <class Vector, int N>
INLINE void copy(Vector (&to)[N], const Vector (&from)[N]) {
  UNROLL for (int n = 0; n < N; ++n) to[n] = from[n];
}

// One number in every lane of a register. Otherwise the compiler would load it again for every use.
template <class T>
INLINE Lanes<T> broadcast(const T* from) {
  Lanes<T> x = *from - Lanes<T>{};
  IN_REGISTER(x);
  return x;
}

// A vector of a row that may end within the vector; missing numbers are zeros.
template <class T>
INLINE Lanes<T> load_until(const T* row, int64_t i, int64_t width) {
  if (i + L<T> <= width) return load(row + i);
  Lanes<T> x = {};
  __builtin_memcpy(&x, row + i, (width - i) * sizeof(T));
  return x;
}
template <class T>
INLINE void store_until(T* row, int64_t i, int64_t width, Lanes<T> x) {
  if (i + L<T> <= width) return store(row + i, x);
  __builtin_memcpy(row + i, &x, (width - i) * sizeof(T));
}

template <>
INLINE Lanes<float> load_as<float, Bfloat16>(const Bfloat16* from) {
  typedef uint16_t Half __attribute__((vector_size(LANE_BYTES / 2)));
  typedef uint32_t Wide __attribute__((vector_size(LANE_BYTES)));
  Half x;
  __builtin_memcpy(&x, from, sizeof x);
  return (Lanes<float>)(__builtin_convertvector(x, Wide) << 16);
}

// The sum of all lanes, in rounds that add to each lane the one `apart` lanes away.
template <class T, int apart, int... I>
INLINE Lanes<T> folded(Lanes<T> x, std::integer_sequence<int, I...> lanes) {
  x += __builtin_shufflevector(x, x, (I ^ apart)...);
  if constexpr (apart > 1) return folded<T, apart / 2>(x, lanes);
  return x;
}
template <class T>
INLINE T sum_of(Lanes<T> x) {
  return folded<T, L<T> / 2>(x, std::make_integer_sequence<int, L<T>>())[0];
}

// The sums of L vectors, one per lane, in rounds that combine two vectors into one with half the numbers of each.
template <class T, int apart, int... I>
INLINE Lanes<T> zip_sums(Lanes<T> x, Lanes<T> y, std::integer_sequence<int, I...>) {
  constexpr int N = L<T>;
  return __builtin_shufflevector(x, y, (I & apart ? N + I - apart : I)...) +
         __builtin_shufflevector(x, y, (I & apart ? N + I : I + apart)...);
}
template <class T, int apart = 1>
INLINE Lanes<T> sums_of(Lanes<T>* x) {
  constexpr int left = L<T> / apart;
  UNROLL for (int i = 0; i < left / 2; ++i)
    x[i] = zip_sums<T, apart>(x[2 * i], x[2 * i + 1], std::make_integer_sequence<int, L<T>>());
  if constexpr (left > 2) return sums_of<T, 2 * apart>(x);
  return x[0];
}

// Tokens of one head are h rows apart, a stride that hardware prefetching does not follow.
template <class T>
INLINE void prefetch(const T* row, int64_t width) {
  for (int64_t i = 0; i < width; i += 64 / sizeof(T)) __builtin_prefetch(row + i, 0, 2);
}
template <class T>
INLINE void prefetch_to_write(T* row, int64_t width) {
  for (int64_t i = 0; i < width; i += 64 / sizeof(T)) __builtin_prefetch(row + i, 1, 2);
}

// The columns of one slice, N vectors wide, of a row of `width` numbers. If the width is not a multiple of L, the last
// vector is moved left to end with the row: it overlaps its neighbour and computes the same numbers again, so that all
// loads and stores are full vectors. Only a row shorter than a vector (then N = 1) is padded with zeros. If a slice ends
// with half a vector (`ends_half`), only the lower lanes of its last vector are used.
template <class T, int N, bool ends_half = false>
struct Columns {
  int64_t width, slice;

  static constexpr bool is_half(int n) { return ends_half && n == N - 1; }
  INLINE bool narrow() const { return N == 1 && width < L<T>; }
  INLINE int64_t begin(int n) const { return (slice * N + n) * L<T>; }
  INLINE int64_t last(int n) const { return width - (is_half(n) ? L<T> / 2 : L<T>); }
  INLINE int64_t at(int n) const { return narrow() ? 0 : begin(n) < last(n) ? begin(n) : last(n); }
  INLINE int64_t lanes() const { return narrow() ? width : L<T>; }

  INLINE Lanes<T> load(const T* row, int n) const {
    if (is_half(n)) return load_half(row + at(n));
    return narrow() ? load_narrow(row, width) : ISA::load(row + at(n));
  }
  INLINE void store(T* row, int n, Lanes<T> x) const {
    if (is_half(n)) __builtin_memcpy(row + at(n), &x, LANE_BYTES / 2);
    else narrow() ? store_narrow(row, width, x) : ISA::store(row + at(n), x);
  }
  // The functions below touch each column of the row exactly once, for sums and for writes shared by two slices.
  INLINE void put(T* row, int n, Lanes<T> x) const {
    begin(n) == at(n) ? store(row, n, x) : put_last(row, begin(n), width, x);
  }
  INLINE void add(T* row, int n, Lanes<T> x) const {
    begin(n) == at(n) ? store(row, n, load(row, n) + x) : put_last(row, begin(n), width, load(row, n) + x);
  }
  INLINE Lanes<T> own(int n) const {  // 1 in the lanes that do not overlap the neighbour, 0 in those that do
    Lanes<T> ones = {};
    for (int64_t lane = begin(n) - at(n); lane < L<T>; ++lane) ones[lane] = 1;
    return ones;
  }

 private:
  INLINE static Lanes<T> load_half(const T* from) {
    Lanes<T> x = {};
    __builtin_memcpy(&x, from, LANE_BYTES / 2);
    return x;
  }
  // Not inlined, because they are rare and would be most of the compiled code.
  OUTLINE static Lanes<T> load_narrow(const T* row, int64_t width) {
    Lanes<T> x = {};
    __builtin_memcpy(&x, row, width * sizeof(T));
    return x;
  }
  OUTLINE static void store_narrow(T* row, int64_t width, Lanes<T> x) { __builtin_memcpy(row, &x, width * sizeof(T)); }
  OUTLINE static void put_last(T* row, int64_t begin, int64_t width, Lanes<T> x) {
    for (int64_t i = begin; i < width; ++i) row[i] = x[i - (width - L<T>)];
  }
};

template <class T>
constexpr int widest_slice = LANE_BYTES == 64 && sizeof(T) == 4 ? 4 : sizeof(T) == 4 && LANE_BYTES >= USUAL_BYTES ? 2 : 1;

// Divides a width into slices such that rows × slice fits into the L1 cache.
struct Slicing {
  int vectors;    // per slice: 1, 2 or, with enough registers, 4
  int64_t count;  // slices
};

template <class T>
Slicing slicing(int64_t rows, int64_t width, int64_t matrices, int threads) {
  constexpr int64_t cache = 20480;
  const int64_t all = (width + L<T> - 1) / L<T>;
  const int64_t wanted = (threads + matrices - 1) / matrices;  // number of slices that gives every thread one
  int vectors = widest_slice<T>;
  while (vectors > 1 && (vectors * rows * LANE_BYTES > cache || vectors / 2 >= all || all / vectors < wanted)) vectors /= 2;
  return {vectors, (all + vectors - 1) / vectors};
}

template <int N, bool half = false>
struct Size : std::integral_constant<int, N> {
  static constexpr bool ends_half = half;
};

// work(N), where N is the number of vectors per slice.
template <class T, class Work>
INLINE void with_vectors(int vectors, const Work& work) {
  if constexpr (widest_slice<T> == 4)
    if (vectors == 4) return work(Size<4>());
  if constexpr (widest_slice<T> >= 2)
    if (vectors == 2) return work(Size<2>());
  work(Size<1>());
}

// work(N, head, slice) for every slice of `width` columns of every head's matrix, distributed over the threads.
template <class T, class Work>
void for_slices(int threads, int64_t heads, int64_t rows, int64_t width, const Work& work) {
  const Slicing cut = slicing<T>(rows, width, heads, threads);
  Pool::run(threads, heads * cut.count, [&](int64_t task) {
    with_vectors<T>(cut.vectors, [&](auto N) { work(N, task / cut.count, task % cut.count); });
  });
}

// The same, for kernels that support slices ending with half a vector. On a CPU that executes a wide vector as two halves
// (Zen 4), this saves an eighth of the work of the widest slice.
template <class T, class Work>
void for_slices_and_half(int threads, int64_t heads, int64_t rows, int64_t width, const Work& work) {
  if constexpr (widest_slice<T> == 4) {
    const Slicing cut = slicing<T>(rows, width, heads, threads);
    if (cut.vectors == 4 && cut.count == 1 && width > 3 * L<T> && width <= 3 * L<T> + L<T> / 2)
      return Pool::run(threads, heads, [&](int64_t head) { work(Size<4, true>(), head, 0); });
  }
  for_slices<T>(threads, heads, rows, width, work);
}

template <class T>
Lanes<T>* scratch(int64_t vectors) {
  static thread_local struct Buffer {
    void* memory = nullptr;
    int64_t bytes = 0;
    ~Buffer() { ::free(memory); }
  } buffer;
  const int64_t bytes = vectors * LANE_BYTES;
  if (buffer.bytes < bytes) {
    ::free(buffer.memory);
    buffer.memory = nullptr, buffer.bytes = 0;
    if (::posix_memalign(&buffer.memory, 64, bytes)) throw std::bad_alloc();
    buffer.bytes = bytes;
  }
  return static_cast<Lanes<T>*>(buffer.memory);
}

// Marks on tokens, [b, t] or null: tokens that begin a segment, and tokens that are written.
struct Marks {
  const uint8_t *resets, *live;
};

// Heads are numbered over b and h. Locates the tokens of one in [b, t, h, ·], and their g queries in [b, t, h·g, ·].
struct Head {
  int64_t first, stride, t, g;
  Marks marks;

  Head(int64_t head, int64_t t, int64_t h, int64_t g, Marks all)
      : first(head / h * t * h + head % h), stride(h), t(t), g(g),
        marks{all.resets ? all.resets + head / h * t : nullptr, all.live ? all.live + head / h * t : nullptr} {}
  INLINE int64_t token(int64_t i) const { return first + i * stride; }
  INLINE int64_t query(int64_t i) const { return token(i) * g; }
  INLINE bool reset(int64_t i) const { return marks.resets && i < t && marks.resets[i]; }
  INLINE bool live(int64_t i) const { return !marks.live || marks.live[i]; }
};

// Waking a second thread pays off from about this many multiply-adds.
inline int threads_for(int threads, int64_t multiply_adds) { return multiply_adds < 400000 ? 1 : threads; }

template <class T, class A, class B>
INLINE T dot_as(const A* a, const B* b, int64_t n) {
  Lanes<T> sums = {};
  int64_t i = 0;
  for (; i + L<T> <= n; i += L<T>) sums += load_as<T>(a + i) * load_as<T>(b + i);
  T sum = sum_of<T>(sums);
  for (; i < n; ++i) sum += T(a[i]) * T(b[i]);
  return sum;
}
template <class T>
INLINE T dot(const T* a, const T* b, int64_t n) {
  return dot_as<T>(a, b, n);
}
