// A loop over independent items on several threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace minicpm41::cpu {

// Calls body(thread, item) once for each item; at most num_threads calls run at a time, each with
// its own thread number. The threads are started here and joined here: that costs some 20 us, next
// to nothing beside the milliseconds of an op, and leaves nothing that a fork of the process could
// break. `body` must not throw: allocate before.
template <typename Body>
void parallel_for(int num_threads, int64_t num_items, Body body) {
  std::atomic<int64_t> next{0};
  auto work = [&](int thread) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < num_items;) {
      body(thread, item);
    }
  };
  std::vector<std::thread> threads;
  for (int thread = 1; thread < num_threads && thread < num_items; ++thread) {
    try {
      threads.emplace_back(work, thread);
    } catch (const std::system_error&) {
      break;  // no more threads to be had: the ones there are do all of the work
    }
  }
  work(0);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace minicpm41::cpu
