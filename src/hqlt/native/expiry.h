// Expiry of entries beyond the window: one pass over a head's entries by age, with a heap of the `kept` best, the worst of
// them on top. When a new entry leaves the window, either it or the entry on top expires.
template <class T>
void expiry_forward(int threads, const int64_t* n, double, void* const* x) {
  struct Entry {
    T score;
    int64_t index;
    bool operator<(const Entry& other) const {  // whether it outranks the other; ties go to the older
      return score > other.score || (score == other.score && index < other.index);
    }
  };
  constexpr int64_t never = int64_t(1) << 62;
  const int64_t b = n[0], l = n[1], h = n[2], kept = n[3];
  const T* scores;
  const int64_t* all_leaves;
  const uint8_t *used, *resets;
  int64_t* expiry;
  from(x, scores, all_leaves, used, resets, expiry);
  const auto one_head = [&](int64_t row, int64_t head) {
    const T* score = scores + row * l * h + head;
    const int64_t* leaves = all_leaves + row * l;
    int64_t* until = expiry + row * l * h + head;
    std::vector<Entry> best;
    best.reserve(std::min(kept, l));
    for (int64_t i = 0; i < l; ++i) {
      if (resets && resets[row * l + i]) best.clear();
      until[i * h] = never;
      if (used && !used[row * l + i]) {
        until[i * h] = 0;
      } else if (const Entry mine = {score[i * h], i}; int64_t(best.size()) < kept) {
        best.push_back(mine);
        std::push_heap(best.begin(), best.end());
      } else if (mine < best.front()) {
        const int64_t out = best.front().index;
        until[out * h] = std::max(leaves[out], leaves[i]);
        std::pop_heap(best.begin(), best.end());
        best.back() = mine;
        std::push_heap(best.begin(), best.end());
      } else {
        until[i * h] = leaves[i];
      }
    }
  };
  constexpr int64_t line = 8;  // heads per cache line, to avoid false sharing between threads
  const int64_t lines = (h + line - 1) / line;
  Pool::run(threads_for(threads, 32 * b * l * h), b * lines, [&](int64_t task) {
    const int64_t first = task % lines * line;
    for (int64_t head = first; head < std::min(first + line, h); ++head) one_head(task / lines, head);
  });
}
