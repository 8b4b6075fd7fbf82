# A guest as on Proxmox VE, with the disk drive-scsi0 and a scripted guest agent. The block can use $qmp_socket,
# $agent_socket, $guest_config, $provider, and $options, the options of a task. The block must leave nothing
# behind.

use v5.36;

use PBA::Test::AgentPeer;
use PBA::Test::DocCode qw(check_same run_perl start_guest);
use PBA::Test::Provider;

return sub ($block) {
    state $backend = start_guest();
    my $outside = $backend->outside;
    my $agent = PBA::Test::AgentPeer->start;
    my %values = (
        '$qmp_socket' => $backend->qmp_path,
        '$agent_socket' => $agent->socket_path,
        '$guest_config' => "name: test\n",
        '$provider' => PBA::Test::Provider->new,
    );
    my %options = (
        $backend->options,
        vmid => 100,
        provider => $values{'$provider'},
        devices => ['drive-scsi0'],
        'guest-config' => $values{'$guest_config'},
        log => sub { },
    );
    run_perl($block, %values, '$options' => \%options);
    check_same($outside, $backend->outside);
};
