// Calls the targets of the library for CPU on sizes, values and alignments that some bytes choose, and
// compares with `reference.h`. For libFuzzer, or with a loop of its own:
//   fuzz SECONDS [SEED [CALLERS]]
// tries random bytes for so long, on so many threads, and prints how many it tried.

#include <atomic>
#include <chrono>
#include <random>

#include "blocks.h"
#include "plain.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace fuzz;
  Bytes bytes(data, size);
  const int64_t target = bytes.Next(10);
  bytes.Seed();
  bytes.Seed();
  switch (target) {
    case 0: Product(bytes); break;
    case 1: FetchedProduct(bytes); break;
    case 2: FetchedSum(bytes); break;
    case 3: ListedProduct(bytes); break;
    case 4: ListedSum(bytes); break;
    case 5: Listed(bytes); break;
    case 6: TopK(bytes); break;
    case 7: SetApart(bytes); break;
    case 8: BlockProduct(bytes); break;
    case 9: PickedProduct(bytes); break;
    default: PickedSum(bytes); break;
  }
  return 0;
}

#ifndef HIRE_LIBFUZZER
int main(int arguments, char** values) {
  const double seconds = arguments > 1 ? std::atof(values[1]) : 1;
  const int seed = arguments > 2 ? std::atoi(values[2]) : 0, callers = arguments > 3 ? std::atoi(values[3]) : 1;
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  std::atomic<int64_t> tried{0};
  std::vector<std::thread> threads;
  for (int caller = 0; caller < callers; ++caller) {
    threads.emplace_back([&, caller] {
      std::mt19937 random(1000 * seed + caller);
      do {
        std::vector<uint8_t> bytes(48);
        for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
        LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
        ++tried;
      } while (std::chrono::steady_clock::now() < end);
    });
  }
  for (std::thread& thread : threads) thread.join();
  fuzz::Pool::Get().Rest();
  std::printf("%lld\n", static_cast<long long>(tried.load()));
}
#endif
