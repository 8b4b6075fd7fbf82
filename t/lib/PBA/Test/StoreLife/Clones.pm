package PBA::Test::StoreLife::Clones;

# The random life of PBA::Test::StoreLife with a store of Example::RawClones, whose archives depend on no other.

use v5.36;

use PBA::Test::StoreLife::Kept qw(digest kept slurp);
use PVE::BackupAccess::Volume;
use Example::RawClones;

use parent qw(PBA::Test::StoreLife);

sub _class ($self) { return 'Example::RawClones' }
sub _depends_on ($self, %parents) { return {} }

sub _looks_right ($self, $path, $expected) {
    my $content = $expected->{content};
    return eval {
        !grep { digest(slurp("$path/$_.raw")) ne $content->{$_} } keys $content->%*;
    };
}

my sub restored ($provider, $name, $device, $size) {
    my $uri = $provider->restore_vm_volume_init($name, $device, {})->{'qemu-img-path'};
    my $volume = PVE::BackupAccess::Volume->open($device, { 'nbd-path' => $uri, size => $size });
    my $content = $volume->pread(0, $size);
    $volume->close;
    $provider->restore_vm_volume_cleanup($name, $device, {});
    return $content;
}

# What a restore finds, as texts.
my sub differences ($provider, $name, $expected) {
    my $sizes = $provider->restore_vm_init($name);
    my @wrong = grep {
        my $content = kept($expected->{content}{$_});
        ($sizes->{$_}{size} // -1) != length($content)
            || restored($provider, $name, $_, length($content)) ne $content
    } sort keys $expected->{content}->%*;
    my $config = $provider->archive_get_guest_config($name);
    return (@wrong, $config ne $expected->{config} ? 'configuration' : ());
}

# A restore does not compare with digests, so it is verify that must report damage.
sub _judge ($self, $store, $name, $seen = {}) {
    my $expected = $store->{archives}{$name};
    my $is_spoilt = scalar($expected->{spoilt}->%*);
    my $provider = $self->_provider($store);
    $self->{count}{'archives judged'}++;
    my $verify = join('; ', (eval { $provider->verify($name) } // [$@])->@*);
    my @wrong = eval { differences($provider, $name, $expected) };
    @wrong = ($@) if $@;
    return "$name is intact, but verify says: $verify" if !$is_spoilt && $verify ne '';
    return "$name is intact, but restored wrong: @wrong" if !$is_spoilt && @wrong;
    return "$name is restored wrong (@wrong), and verify does not say so"
        if @wrong && $verify eq '';
    return undef;
}

1;
