// SPDX-License-Identifier: Apache-2.0
// The pool under load from several threads, its faults, and its end with work queued, for race
// checkers to watch.
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "check.hpp"
#include "io/arena.hpp"
#include "io/direct_file.hpp"
#include "io/io_pool.hpp"
#include "io/memory_nodes.hpp"

namespace {

constexpr std::size_t kOpNbytes = 3 * kv::Ticket::kPieceNbytes / 2;
constexpr std::size_t kNumOps = 8;
constexpr std::size_t kPage = 4096;

void fill(kv::Bytes bytes, std::size_t seed) {
  for (std::size_t at = 0; at < bytes.size(); at += sizeof(std::uint64_t)) {
    const std::uint64_t value = (seed + at) * 0x9E3779B97F4A7C15ULL;
    std::memcpy(bytes.data() + at, &value, sizeof(value));
  }
}

kv::ConstBytes constant(kv::Bytes bytes) { return {bytes.data(), bytes.size()}; }

void threads_share_a_pool(kv::IoPool& pool, const std::shared_ptr<kv::DirectFile>& file) {
  std::vector<std::thread> threads;
  for (std::size_t index = 0; index < 3; ++index) {
    threads.emplace_back([&pool, &file, index] {
      const std::uint64_t base = index * kNumOps * kOpNbytes;
      kv::Arena source(kNumOps * kOpNbytes, false);
      kv::Arena destination(kNumOps * kOpNbytes, false);
      fill(source.bytes(), index);
      std::vector<kv::IoOp> ops;
      for (std::size_t op = 0; op < kNumOps; ++op) {
        ops.push_back(kv::IoOp{base + op * kOpNbytes, op * kOpNbytes, kOpNbytes});
      }
      pool.submit_write(file, constant(source.bytes()), ops)->wait();
      pool.submit_read(file, destination.bytes(), ops)->wait();
      CHECK(std::memcmp(source.bytes().data(), destination.bytes().data(), kNumOps * kOpNbytes) ==
            0);
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

void faults_travel_in_tickets(kv::IoPool& pool, const std::shared_ptr<kv::DirectFile>& file) {
  kv::Arena arena(4 * kPage, false);
  const std::uint64_t beyond = 1ULL << 30;
  const auto ticket = pool.submit_read(
      file, arena.bytes(), {kv::IoOp{beyond, 0, kPage}, kv::IoOp{beyond, kPage, kPage}});
  CHECK_THROWS(ticket->wait(), kv::IoError);
  CHECK(ticket->done());
  CHECK(ticket->errors().size() == 2);
  CHECK_THROWS(pool.submit_read(file, arena.bytes(), {kv::IoOp{0, 4 * kPage, kPage}}),
               kv::ShapeError);
  CHECK_THROWS(pool.submit_read(file, arena.bytes(), {kv::IoOp{0, UINT64_MAX, kPage}}),
               kv::ShapeError);
}

void askers_and_a_canceller_share_a_ticket(kv::IoPool& pool,
                                           const std::shared_ptr<kv::DirectFile>& file) {
  kv::Arena arena(kNumOps * kOpNbytes, false);
  for (int round = 0; round < 20; ++round) {
    std::vector<kv::IoOp> ops;
    for (std::size_t op = 0; op < 64; ++op) {
      ops.push_back(kv::IoOp{op * kPage, op * kPage, op % 8 == 0 ? 0 : kPage});
    }
    const auto ticket = pool.submit_read(file, arena.bytes(), ops);
    std::size_t num_told = 0;
    std::thread teller([&ticket, &num_told] {
      for (auto some = ticket->wait_some(); !some.empty(); some = ticket->wait_some()) {
        num_told += some.size();
      }
    });
    std::thread asker([&ticket] {
      while (!ticket->done()) {
        static_cast<void>(ticket->errors());
        std::this_thread::yield();
      }
    });
    std::thread canceller([&ticket] { ticket->cancel(); });
    try {
      ticket->wait();
    } catch (const kv::IoError& error) {
      CHECK(error.error_number() == ECANCELED);
    }
    teller.join();
    asker.join();
    canceller.join();
    CHECK(num_told == ops.size());
  }
}

void the_end_waits_for_queued_work(const kv::IoPool::Options& options,
                                   const std::shared_ptr<kv::DirectFile>& file) {
  kv::Arena arena(kNumOps * kOpNbytes, false);
  std::shared_ptr<kv::Ticket> ticket;
  {
    kv::IoPool pool(options);
    ticket =
        pool.submit_write(file, constant(arena.bytes()), {kv::IoOp{0, 0, kNumOps * kOpNbytes}});
  }
  CHECK(ticket->done());
  ticket->wait();
}

void check_present(kv::Bytes memory) {
  std::vector<unsigned char> present(memory.size() / kPage);
  CHECK(::mincore(memory.data(), memory.size(), present.data()) == 0);
  CHECK(std::all_of(present.begin(), present.end(), [](unsigned char page) { return page & 1; }));
  CHECK(std::all_of(memory.data(), memory.data() + kPage,
                    [](std::uint8_t byte) { return byte == 0; }));
}

void memory_is_present_after_a_touch() {
  const std::size_t nbytes = (std::size_t{130} << 20) + kPage;
  kv::Arena arena(nbytes, false);
  kv::interleave(arena.bytes());
  kv::touch(arena.bytes(), 3);
  check_present(arena.bytes());
}

void memory_is_present_where_no_thread_can_be_had() {
  kv::Arena arena(std::size_t{130} << 20, false);
  pthread_attr_t usual;
  CHECK(::pthread_getattr_default_np(&usual) == 0);
  pthread_attr_t huge = usual;
  CHECK(::pthread_attr_setstacksize(&huge, std::size_t{1} << 47) ==
        0);  // as much as there are addresses
  CHECK(::pthread_setattr_default_np(&huge) == 0);
  CHECK_THROWS(std::thread([] {}), std::system_error);
  kv::touch(arena.bytes(), 3);
  CHECK(::pthread_setattr_default_np(&usual) == 0);
  check_present(arena.bytes());
}

void lists_of_nodes_are_read() {
  using Nodes = std::vector<unsigned>;
  CHECK(kv::parse_nodes("0") == Nodes{0});
  CHECK((kv::parse_nodes("0-2,5") == Nodes{0, 1, 2, 5}));
  for (const char* wrong :
       {"", "x", "1-", "2-1", "0,", ",0", "1024", "0 1", "99999999999999999999"}) {
    CHECK(kv::parse_nodes(wrong).empty());
  }
}

}  // namespace

void test_io() {
  memory_is_present_after_a_touch();
  memory_is_present_where_no_thread_can_be_had();
  lists_of_nodes_are_read();
  std::string path = "/tmp/kvstore-native-test-XXXXXX";
  const int descriptor = ::mkstemp(path.data());
  CHECK(descriptor >= 0);
  ::close(descriptor);
  for (const std::optional<kv::EngineKind> engine :
       {std::optional<kv::EngineKind>(), std::optional(kv::EngineKind::kThreads)}) {
    const auto file = std::make_shared<kv::DirectFile>(path, true);
    const kv::IoPool::Options options{2, engine, 8};
    kv::IoPool pool(options);
    threads_share_a_pool(pool, file);
    faults_travel_in_tickets(pool, file);
    askers_and_a_canceller_share_a_ticket(pool, file);
    the_end_waits_for_queued_work(options, file);
    pool.close();
    CHECK_THROWS(kv::DirectFile(path + "-absent", false), kv::IoError);
  }
  CHECK(::unlink(path.c_str()) == 0);
}
