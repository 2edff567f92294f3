// Entries that stay visible beyond the window, in the step for one token (step.h): K slots per head, unused slots first,
// then the entries from the oldest on.
//
//     score      of an entry, finite and fixed when it arrives; the highest for the first entries of a segment, the sinks
//     selection  of the kept entries and those that leave the window, the K highest scores stay, ties to the older
//     rotation   by a distance d = Σ digit · 64^level: Π exp(i f · digit · 64^level), for any d
//
// An entry is identified by its location: a kept slot (0 … K−1), one of the s held slots after those, or last the token's
// own entry.

template <class T>
struct Rotation {  // rotation of a key, [k/2] each; null for none
  const T *cos, *sin;
};

template <class T, class S>
struct Kept {
  enum Scores { lowest, error, weighted_error, value_norm, random };
  enum Distances { in_truth, as_the_window, nowhere };
  static constexpr int64_t unused = -1;
  static constexpr uint64_t base = 64;  // base of the digits of a distance
  static constexpr T highest = std::numeric_limits<float>::max();

  int64_t slots, sinks, alike, scored, distances;  // alike: whether all heads keep the same entries
  const S *keys, *values;    // [b, K, h, ·]
  const int64_t* positions;  // [b, K, h]
  const T *scores;           // [b, K + s, h]
  const T *cos, *sin;        // [11 · 64, k/2], null without positions
  S *keys_after, *values_after;
  int64_t* positions_after;
  T* scores_after;

  // The heads of a task, and what this token changes.
  struct Stretch {
    int64_t row, first, heads, h, s, now;
    int64_t before, after;  // entries held before and after the token; the rest leaves the window
    bool at_once;           // whether this token already sees, beyond the window, the entries that leave it
    INLINE int64_t number(int64_t slots, int64_t slot, int64_t head) const { return (row * slots + slot) * h + first + head; }
  };
  struct Room {
    T *score, *ranks, *rotation;  // scores of the token's own entries [heads]; scores of the entries that stay [heads, K]
    int64_t* stays;
  };
  // Locations of keys or values.
  struct Rows {
    const S *kept, *held, *own;  // own: that of the first head; the next is `apart` numbers away
    int64_t apart, width;
    S* after;
  };

  bool asks_for_errors() const { return slots && (scored == error || scored == weighted_error); }

  bool has_memory() const {
    return keys && values && positions && scores && keys_after && values_after && positions_after && scores_after;
  }

  // Score of an entry for a head. squares: sum of squares of the FW-memory's error.
  T score(int64_t position, int64_t head, int64_t h, T squares, T beta, const T* value, int64_t v) const {
    T score = -highest;
    if (scored == error) score = std::sqrt(squares);
    if (scored == weighted_error) score = beta * std::sqrt(squares);
    if (scored == value_norm) score = std::sqrt(dot(value, value, v));
    if (scored == random) {
      uint32_t x = uint32_t(uint64_t(position) * uint64_t(h) + uint64_t(head));
      x = (x ^ (x >> 16)) * 0x21F0AAADu;
      x = (x ^ (x >> 15)) * 0x735A2D97u;
      score = T((x ^ (x >> 15)) >> 8);
    }
    return finite(score);
  }
  static T finite(T score) { return score == score ? std::min(std::max(score, -highest), highest) : -highest; }

  // The scores of a token as they are stored, from those of the heads (of all heads, if all keep the same entries).
  void settle(int64_t position, int64_t heads, T* score) const {
    if (alike) std::fill_n(score, heads, finite(std::accumulate(score, score + heads, T(0)) / T(heads)));
    if (position < sinks) std::fill_n(score, heads, highest);
  }

  // Selects the entries that stay, for each head.
  void contest(const Stretch& of, const Room& at) const {
    const int64_t all = slots + of.s, in_use = used(of);
    for (int64_t head = 0; head < of.heads; ++head) {
      int64_t* stays = at.stays + head * slots;
      T* ranks = at.ranks + head * slots;
      for (int64_t i = 0; i < slots; ++i) {
        const bool there = i >= slots - in_use;
        stays[i] = there ? i : unused, ranks[i] = there ? scores[of.number(all, i, head)] : T(0);
      }
      for (int64_t entry = all - of.before; entry <= all - of.after; ++entry)
        enter(entry, entry < all ? scores[of.number(all, entry, head)] : at.score[head], stays, ranks);
    }
  }

  // Calls read(slot, head, entry, row) for visible entries and put(to, row, width) for those that stay, in memory order.
  template <class Read, class Put>
  INLINE void each(const Stretch& of, const Room& at, const Rows& rows, const Read& read, const Put& put) const {
    const int64_t in_use = used(of);
    for (int64_t i = 0; i < slots; ++i)
      for (int64_t head = 0; head < of.heads; ++head) {
        const auto find = [&](int64_t entry) {
          if (entry < slots) return rows.kept + of.number(slots, entry, head) * rows.width;
          return entry < slots + of.s ? rows.held + of.number(of.s, entry - slots, head) * rows.width : rows.own + head * rows.apart;
        };
        const int64_t stays = at.stays[head * slots + i], seen = of.at_once ? stays : i < slots - in_use ? unused : i;
        S* to = rows.after + of.number(slots, i, head) * rows.width;
        if (seen != unused) read(i, head, seen, find(seen));
        if (stays != unused) put(to, find(stays), rows.width);
        else std::fill_n(to, rows.width, S(0));
      }
  }

  // Positions and scores, including those of the recent entries.
  void write(const Stretch& of, const Room& at) const {
    const int64_t all = slots + of.s;
    for (int64_t i = 0; i < slots; ++i)
      for (int64_t head = 0; head < of.heads; ++head) {
        const int64_t entry = at.stays[head * slots + i];
        positions_after[of.number(slots, i, head)] = entry == unused ? 0 : position(of, entry, head);
        scores_after[of.number(all, i, head)] = at.ranks[head * slots + i];
      }
    for (int64_t i = slots; i < all; ++i) {
      T* to = scores_after + of.number(all, i, 0);
      if (i < all - of.after) std::fill_n(to, of.heads, T(0));
      else std::copy_n(i + 1 < all ? scores + of.number(all, i + 1, 0) : at.score, of.heads, to);
    }
  }

  // The rotation of an entry's key, by its distance from this token.
  INLINE Rotation<T> rotation(const Stretch& of, const Room& at, int64_t entry, int64_t head, int64_t half) const {
    // Unsigned, because positions in a state made by hand may be any numbers.
    return rotation(int64_t(uint64_t(of.now) - uint64_t(position(of, entry, head))), half, at.rotation);
  }

  // The rotation by a distance. room: space for two rows of full vectors.
  Rotation<T> rotation(int64_t distance, int64_t half, T* room) const {
    if (!cos) return {nullptr, nullptr};
    const T direction = distance < 0 ? T(-1) : T(1);  // negative only in a state made by hand
    uint64_t left = distance < 0 ? 0 - uint64_t(distance) : uint64_t(distance);
    Rotation<T> product = {cos, sin};
    for (uint64_t row = 0; left; row += base, left /= base)
      if (left % base) {
        const int64_t at = int64_t(row + left % base) * half;
        const Rotation<T> by = {cos + at, sin + at};
        product = row || direction < 0 ? multiplied(product, by, direction, half, room) : by;
      }
    return product;
  }

 private:
  int64_t used(const Stretch& of) const { return std::min(of.now - of.before, slots); }

  int64_t position(const Stretch& of, int64_t entry, int64_t head) const {
    return entry < slots ? positions[of.number(slots, entry, head)] : of.now - (slots + of.s - entry);
  }

  // An entry leaves the window; it is newer than those that left before.
  void enter(int64_t entry, T score, int64_t* stays, T* ranks) const {
    int64_t out = 0;
    if (stays[0] != unused) {
      for (int64_t i = 1; i < slots; ++i)
        if (ranks[i] <= ranks[out]) out = i;
      if (!(score > ranks[out])) return;
    }
    std::copy(stays + out + 1, stays + slots, stays + out);
    std::copy(ranks + out + 1, ranks + slots, ranks + out);
    stays[slots - 1] = entry, ranks[slots - 1] = score;
  }

  static Rotation<T> multiplied(Rotation<T> x, Rotation<T> by, T direction, int64_t half, T* room) {
    T *cos = room, *sin = room + (half + L<T> - 1) / L<T> * L<T>;
    for (int64_t i = 0; i < half; i += L<T>) {
      const auto at = [=](const T* row) { return load_until(row, i, half); };
      const Lanes<T> c = at(x.cos), s = at(x.sin), turn = direction * at(by.sin);
      store(cos + i, c * at(by.cos) - s * turn);
      store(sin + i, c * turn + s * at(by.cos));
    }
    return {cos, sin};
  }
};
