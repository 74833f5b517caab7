// SPDX-License-Identifier: Apache-2.0
// Lanes and their turns.
#include <algorithm>
#include <utility>

#include "io/engine.hpp"

namespace kv {
namespace {

// What a piece takes of the room in flight. Nobody works on the first writes while the last ones go
// on: a deeper queue costs them nothing, and lasts longer while the thread waits for a processor.
std::size_t room_of(const Piece& piece) {
  return piece.direction == Direction::kRead ? piece.nbytes : piece.nbytes / 4;
}

}  // namespace

void TicketQueue::push(std::shared_ptr<Ticket> ticket) {
  const dev_t device = ticket->device();
  const Direction direction = ticket->direction();
  auto lane = std::find_if(lanes_.begin(), lanes_.end(), [&](const Lane& each) {
    return each.device == device && each.direction == direction;
  });
  if (lane == lanes_.end()) {
    lane = lanes_.insert(lane, Lane{device, direction, {}});
  }
  lane->tickets.push_back(std::move(ticket));
}

std::optional<TicketQueue::Taken> TicketQueue::take() {
  for (auto lane = lanes_.begin(); lane != lanes_.end(); ++lane) {
    while (!lane->tickets.empty() && lane->num_pieces < share_.num_pieces &&
           lane->nbytes < share_.nbytes) {
      if (std::optional<Piece> piece = lane->tickets.front()->take()) {
        ++lane->num_pieces;
        lane->nbytes += room_of(*piece);
        lanes_.splice(lanes_.end(), lanes_, lane);
        return Taken{lane->tickets.front(), std::move(*piece), lane};
      }
      lane->tickets.pop_front();
    }
  }
  return std::nullopt;
}

void TicketQueue::end(const Taken& taken) noexcept {
  --taken.lane->num_pieces;
  taken.lane->nbytes -= room_of(taken.piece);
}

}  // namespace kv
